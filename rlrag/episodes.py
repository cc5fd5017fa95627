"""A log of episodes to look at: episodes.jsonl in a run's directory, a row a trajectory, tokens with their numbers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.rewards.paid import Paid
from rlrag.trajectory import Group, SearchRecord, Stream, Trajectory

NUMBERS = ("logp", "entropy", "certainty")
DIGITS = 4  # significant ones kept


def token_texts(vocabulary: Sequence[bytes]) -> list[str]:
    """What is shown for each token id: its text, bytes that are no UTF-8 of their own as \\xNN, <ID> if it has none."""
    return [token.decode("utf-8", errors="backslashreplace") or f"<{id}>" for id, token in enumerate(vocabulary)]


class EpisodeLog:
    """Appends whole rows. After a restore, `rlrag.metrics.rewind` drops those of steps that are played again."""

    def __init__(self, directory: Path, vocabulary: Sequence[bytes]):
        self.path = directory / "episodes.jsonl"
        self._texts = token_texts(vocabulary)

    def write(
        self,
        stage: str,
        step: int,
        groups: Sequence[Group],
        paid: Sequence[Sequence[Paid]],
        limit: int,
        advantages: Mapping[tuple[int, int], np.ndarray] | None = None,
    ) -> None:
        """The first `limit` episodes, whole groups first. advantages: of the tokens of (episode number, call), less a
        shared prefix, which is observed."""
        rows, episode = [], 0
        for group, payments in zip(groups, paid, strict=True):
            for trajectory, payment in zip(group.trajectories, payments, strict=True):
                if len(rows) < limit:
                    rows.append(self._row(stage, step, trajectory, payment, episode, advantages or {}))
                episode += 1
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _row(self, stage: str, step: int, t: Trajectory, paid: Paid, episode: int, advantages) -> dict[str, Any]:
        example = t.example
        totals = [np.nansum([values[call] for values in paid.per_call.values()]) for call in range(len(t.streams))]
        return {
            "stage": stage,
            "step": step,
            "id": example.id,
            "question": example.question,
            "answers": list(example.answers),
            "hops": example.hops,
            "sample": t.sample,
            "version": t.policy_version,
            "status": t.status,
            "error": t.error,
            "prediction": t.outcome.answer,
            "reward": shorten(totals[0]) if totals else 0.0,
            "rewards": {name: numbers(values) for name, values in paid.per_call.items()},
            "metrics": {name: shorten(value) for name, value in paid.metrics.items()},
            "streams": [self._stream(s, advantages.get((episode, call))) for call, s in enumerate(t.streams)],
            "searches": [search(record, example.gold) for record in t.searches],
        }

    def _stream(self, stream: Stream, advantage: np.ndarray | None) -> dict[str, Any]:
        spans, at = [], 0
        if advantage is not None:  # a shared prefix is not in it
            advantage = np.concatenate([np.zeros(stream.num_tokens - len(advantage), np.float32), advantage])
        for span in stream.spans:
            ids = span.tokens.tolist()
            row = {"role": span.role, "act": span.act, "tokens": ids, "texts": [self._texts[id] for id in ids]}
            for name in NUMBERS:
                values = getattr(span, name)
                if values is not None:
                    row[name] = numbers(values)
            if span.tags is not None:
                row["tags"] = span.tags.tolist()
            if advantage is not None and span.act:
                row["advantage"] = numbers(advantage[at : at + len(ids)])
            spans.append(row)
            at += len(ids)
        return {"name": stream.name, "role": stream.role, "spans": spans}


def search(record: SearchRecord, gold: Sequence[str]) -> dict[str, Any]:
    results = [
        [
            {"id": p.id, "title": p.title, "text": p.text, "score": shorten(p.score), "gold": p.id in gold}
            for p in passages
        ]
        for passages in record.results
    ]
    return {
        "queries": list(record.queries),
        "results": results,
        "wait_s": shorten(record.wait_s),
        "error": record.error,
    }


def shorten(value: Any) -> float | None:
    """A few significant digits; None for nan, infinity and None."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.{DIGITS}g}")


def numbers(values: Iterable[float]) -> list[float | None]:
    return [shorten(value) for value in values]
