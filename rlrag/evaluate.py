"""Held-out evaluation: greedy episodes, EM and F1 with bootstrap intervals, and what it cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlrag.agents.workflow import Script, drive
from rlrag.data.task import Task
from rlrag.model.transformer import DecodeWeights
from rlrag.recipes.recipe import Recipe
from rlrag.retrieval.client import Index
from rlrag.rewards.answer import exact_match, f1
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import Example, Group, Trajectory

CONFIDENCE = 0.95
RESAMPLES = 2000


def evaluate(
    engine: Engine, weights: Mapping[str, DecodeWeights], examples: Sequence[Example], recipe: Recipe, seed: int = 0
) -> list[dict[str, Any]]:
    """One evaluation-mode episode of each example; rows as `row` makes them, in example order."""
    play = Play(recipe.workflow, recipe.roles, mode="evaluate")
    groups = engine.run(weights, examples, play, jax.random.key(seed))
    return [row(group.trajectories[0]) for group in groups]


def play_script(task: Task, examples: Iterable[Example], script_of) -> list[dict[str, Any]]:
    """The same rows for a scripted policy: the bounds of a result."""

    def one(example: Example) -> dict[str, Any]:
        script: Script = script_of(example)
        search = _one_scope(task.index)
        return row(drive(task.workflow, example, script, search, mode="evaluate"))

    return [one(example) for example in examples]


def _one_scope(index: Index):
    return lambda queries, k, scope: index.search(queries, k, [scope] * len(queries))


def row(trajectory: Trajectory) -> dict[str, Any]:
    """A prediction as it is written to JSONL."""
    example, answer = trajectory.example, trajectory.outcome.answer
    return {
        "id": example.id,
        "question": example.question,
        "answers": list(example.answers),
        "prediction": answer,
        "em": exact_match(answer, example.answers),
        "f1": f1(answer, example.answers),
        "searches": trajectory.num_searches,
        "tokens": trajectory.num_sampled,
        "hops": example.hops,
        "status": trajectory.status,
        "recall": recall(trajectory),
    }


def recall(trajectory: Trajectory) -> float | None:
    """Share of the gold passages that any search of the episode returned; None where no gold is known."""
    gold = set(trajectory.example.gold)
    if not gold:
        return None
    found = {p.id for record in trajectory.searches for passages in record.results for p in passages}
    return len(gold & found) / len(gold)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over rows; EM and F1 with 95 % bootstrap intervals over questions; EM and searches by number of hops."""
    em, token_f1 = (np.array([r[name] for r in rows], float) for name in ("em", "f1"))
    summary: dict[str, Any] = {
        "questions": len(rows),
        "em": float(em.mean()),
        "em_interval": interval(em),
        "f1": float(token_f1.mean()),
        "f1_interval": interval(token_f1),
        "searches": float(np.mean([r["searches"] for r in rows])),
        "tokens": float(np.mean([r["tokens"] for r in rows])),
        "answered": float(np.mean([r["prediction"] is not None for r in rows])),
    }
    recalls = [r["recall"] for r in rows if r.get("recall") is not None]
    if recalls:
        summary["recall"] = float(np.mean(recalls))
    hops = sorted({r["hops"] for r in rows if r["hops"] is not None})
    if hops:
        summary["hops"] = float(np.mean([r["hops"] for r in rows if r["hops"] is not None]))
    for hop in hops:
        same = [r for r in rows if r["hops"] == hop]
        summary[f"em_hops{hop}"] = float(np.mean([r["em"] for r in same]))
        summary[f"searches_hops{hop}"] = float(np.mean([r["searches"] for r in same]))
    return summary


def interval(values: np.ndarray) -> list[float]:
    """Percentile bootstrap interval of the mean, over questions, with a fixed seed."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    from scipy.stats import bootstrap  # late: 0.4 s

    result = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    )  # fmt: skip
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def mean_reward(groups: Sequence[Group], paid) -> float:
    """Mean of the summed rewards of an episode's first call."""
    totals = [sum(values[0] for values in p.per_call.values()) for group in paid for p in group]
    return float(np.mean(totals)) if totals else 0.0
