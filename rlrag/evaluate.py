"""Held-out evaluation: greedy episodes, EM and F1 with bootstrap intervals, the searches' recall, and what it cost."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlrag import config, processes
from rlrag.agents.workflow import Script, drive
from rlrag.checkpoint import Checkpoints, load_config
from rlrag.console import LINE_EVERY_S, Bar, bar, say
from rlrag.data.task import Task, open_source, open_task, served
from rlrag.mesh import make_mesh, num_shards
from rlrag.model.decoding import DecodeWeights, build_pack
from rlrag.model.parameters import initialize, shardings
from rlrag.recipes.recipe import Recipe
from rlrag.retrieval.index import Index
from rlrag.retrieval.service import open_remote
from rlrag.rewards.answer import exact_match, f1
from rlrag.rewards.paid import Paid
from rlrag.rollout.engine import Engine, Play
from rlrag.setup import acting_models, build_architecture, build_engine, build_stages
from rlrag.trajectory import Example, Group, SearchUnavailable, Trajectory

CONFIDENCE = 0.95
RESAMPLES = 2000
RECALL_AT = (3, 10)  # passages a query, where a whole corpus is searched
QUERIES_A_CALL = 64  # a retriever's deadline holds for each call


def evaluate(
    engine: Engine,
    weights: Mapping[str, DecodeWeights],
    examples: Sequence[Example],
    recipe: Recipe,
    seed: int = 0,
    progress: Callable[[dict[str, Any], Group], None] = lambda row, group: None,
) -> list[dict[str, Any]]:
    """One evaluation-mode episode of each example; rows as `row` makes them, in example order, with the recall of their
    searches (`search_recall`). Each process plays its share, shows it to `progress` row by row, and has all rows at the
    end."""
    play = Play(recipe.workflow, recipe.roles, mode="evaluate", tools=recipe.tools)
    rows, trajectories = [], []
    for group in engine.run(weights, processes.share(examples), play, jax.random.key(seed)):
        trajectories.append(group.trajectories[0])
        (paid,) = recipe.reward(group)
        rows.append(row(group.trajectories[0]) | {"reward": total_reward(paid)})
        progress(rows[-1], group)
    assert engine.searcher is not None
    rows = [r | found for r, found in zip(rows, search_recall(trajectories, engine.searcher), strict=True)]
    return [each for part in processes.gather("evaluation", rows) for each in part]


def evaluate_checkpoint(workdir: Path, data: str, format: str | None = None) -> list[dict[str, Any]]:
    """Rows of the newest checkpoint in a run's directory on `data`: a file in any format (or a part of one,
    `FILE?split=dev&n=100`), `tfds:NAME?...`, or `world:NAME?...` of the world it was trained on.

    Raises ValueError, with the remedy, where there is no checkpoint, or data and checkpoint do not belong together.
    """
    experiment = config.from_dict(load_config(workdir))
    directory = workdir / "checkpoints"
    checkpoints = Checkpoints(directory) if directory.is_dir() else None
    step = checkpoints.latest() if checkpoints else None
    if checkpoints is None or step is None:
        raise ValueError(f"{workdir} holds no checkpoint yet: let the training reach its first one")
    # Over the devices that are here, however many it was trained on.
    mesh = make_mesh(model=math.gcd(experiment.mesh.model, jax.device_count()))
    for name in ("num_slots", "prefill_rows", "num_pages"):
        size, shards = getattr(experiment.rollout, name), num_shards(mesh)
        setattr(experiment.rollout, name, -(-size // shards) * shards)
    with jax.set_mesh(mesh), open_remote(experiment.retriever, served(experiment), None) as remote:
        task, examples = open_evaluation(experiment, workdir, data, format, remote)
        a = build_architecture(experiment, task)
        like = jax.jit(lambda: initialize(a, jax.random.key(0)), out_shardings=shardings(a, mesh))()
        stages = build_stages(experiment, task)
        recipe, pack_weights = stages[-1].recipe, build_pack(a, mesh)
        models = acting_models(stages[-1:])
        weights = {model: pack_weights(checkpoints.restore_params(step, like, model)) for model in models}
        checkpoints.close()
        engine = build_engine(experiment, task, a, mesh, models)
        with bar("evaluate", len(examples), first_line_s=LINE_EVERY_S) as progress:
            rows = evaluate(engine, weights, examples, recipe, progress=Shown(progress))
        engine.close()
        for name, summary in bounds(task, examples).items():
            say(f"{name} policy: EM {summary['em']:.4f}")
    return rows


def bounds(task: Task, examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Summaries of the task's scripted policies, "oracle" and "random", as far as it has them: they frame a score."""
    scripts = {name: task.bounds[name] for name in ("oracle", "random") if name in task.bounds}
    return {name: summarize(play_script(task, examples, script_of)) for name, script_of in scripts.items()}


class Shown:
    """Running means of EM and F1 on a progress bar."""

    def __init__(self, progress: Bar):
        self.progress, self.rows, self.em, self.f1 = progress, 0, 0.0, 0.0

    def __call__(self, row: Mapping[str, Any], group: Group) -> None:
        self.rows, self.em, self.f1 = self.rows + 1, self.em + row["em"], self.f1 + row["f1"]
        self.progress.show(EM=f"{self.em / self.rows:.3f}", F1=f"{self.f1 / self.rows:.3f}")


def open_evaluation(
    experiment: config.Experiment, workdir: Path, data: str, format: str | None, remote: Index | None = None
) -> tuple[Task, Sequence[Example]]:
    """The task a checkpoint was trained for, and the questions to ask it. A run's own tokenizer goes before all."""
    of_world, asks_world = experiment.data.train.startswith("world:"), data.startswith("world:")
    if asks_world and not of_world:
        raise ValueError(f"{workdir} was trained on {experiment.data.train}, not on a world: give a file, not {data!r}")
    if asks_world:
        experiment.data.test = data  # opening the task then sees whether it is the same world
    elif not of_world and not experiment.tokenizer.path and (workdir / "tokenizer").is_dir():
        experiment.tokenizer.path = str(workdir / "tokenizer")
    task, examples = open_task(experiment, workdir, remote), open_source(data, format or "")
    if not of_world and not any(examples[row].gold for row in range(len(examples))):
        task = replace(task, bounds={name: task.bounds[name] for name in task.bounds if name != "oracle"})
    try:
        for row in range(len(examples)):
            task.tokenizer.encode(examples[row].question)
    except ValueError as error:
        raise ValueError(
            f"{workdir} cannot read {data}: {error}. It was trained on {experiment.data.train.partition('?')[0]} and "
            "knows no other words: evaluate it there, or train on text (configs/multihop.py)"
        ) from None
    return task, examples


def play_script(task: Task, examples: Iterable[Example], script_of) -> list[dict[str, Any]]:
    """The same rows for a scripted policy: the bounds of a result."""

    def one(example: Example) -> dict[str, Any]:
        script: Script = script_of(example)
        trajectory = drive(task.workflow, example, script, _one_scope(task.index), mode="evaluate")
        (found,) = search_recall([trajectory], task.index)
        return row(trajectory) | found

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
        "em": exact_match(answer, example.answers) if example.answers else 0.0,
        "f1": f1(answer, example.answers) if example.answers else 0.0,
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


def search_recall(
    trajectories: Sequence[Trajectory], index: Index, ks: Sequence[int] = RECALL_AT
) -> list[dict[str, float]]:
    """`{"recall@k": share of the gold passages among the best k of each query}` of the queries an episode asked.

    They are asked again, so that k may be more than the agent reads. Empty where no gold is known, and for questions
    with a scope, whose few passages a k of 10 would exhaust.
    """
    known = [t.example.gold and t.example.scope is None for t in trajectories]
    asked = [[query for record in t.searches for query in record.queries] for t in trajectories]
    queries = list(dict.fromkeys(query for queries, counts in zip(asked, known) if counts for query in queries))
    best = {}
    for start in range(0, len(queries), QUERIES_A_CALL):
        some = queries[start : start + QUERIES_A_CALL]
        try:
            best |= zip(some, index.search(some, max(ks)), strict=True)
        except SearchUnavailable as error:
            say(f"the recall of {len(some)} queries is not measured: {error.reason}")

    def share(gold: Sequence[str], queries: Sequence[str], k: int) -> float:
        found = {passage.id for query in queries for passage in best[query][:k]}
        return len(found.intersection(gold)) / len(set(gold))

    return [
        {f"recall@{k}": share(t.example.gold, queries, k) for k in ks} if counts and best.keys() >= {*queries} else {}
        for t, queries, counts in zip(trajectories, asked, known)
    ]


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
    if rows and "reward" in rows[0]:
        rewards = np.array([r["reward"] for r in rows], float)
        summary |= {"reward": float(rewards.mean()), "reward_interval": interval(rewards)}
    for name in ("recall", *(f"recall@{k}" for k in RECALL_AT)):
        recalls = [r[name] for r in rows if r.get(name) is not None]
        if recalls:
            summary[name] = float(np.mean(recalls))
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

    dice = np.random.default_rng(0)
    result = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=dice
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def total_reward(paid: Paid) -> float:
    """What the first call is paid in all; 0 where nothing is."""
    return float(np.nansum([values[0] for values in paid.per_call.values() if values]))
