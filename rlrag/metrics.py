"""Metrics that add exactly, and where they are written.

A mean is carried as (total, count) and divided once at the end, so that micro-batches, packing and device count change
nothing.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sum:
    """A mean in two parts: total and the count it is over."""

    total: jax.Array
    count: jax.Array

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total, self.count + other.count)

    def value(self) -> jax.Array:
        """total / count, 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1e-30), 0.0)


@flax.struct.dataclass
class Peak:
    """The largest value seen."""

    highest: jax.Array

    def merge(self, other: "Peak") -> "Peak":
        return Peak(jnp.maximum(self.highest, other.highest))

    def value(self) -> jax.Array:
        return self.highest


Metric = Sum | Peak
Metrics = dict[str, Metric]


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> Metrics:
    """The metrics of both, which carry the same names."""
    assert first.keys() == second.keys(), f"metrics differ in {sorted(first.keys() ^ second.keys())}"
    return {name: first[name].merge(second[name]) for name in first}  # type: ignore[arg-type]


def nothing(like: Mapping[str, Metric]) -> Metrics:
    """What changes nothing when it is merged with metrics of these names and shapes, on the host."""
    zero, lowest = np.float32(0), np.float32(-np.inf)
    return {name: Sum(zero, zero) if isinstance(metric, Sum) else Peak(lowest) for name, metric in like.items()}  # type: ignore[arg-type]


class Writer:
    """Numbers by step to `metrics.jsonl` and TensorBoard events in a run's directory.

    A row is one JSON object {"step", "stage", name: value, ...}, written whole and flushed. After a restore `rewind`
    drops the rows of steps that will be played again: none is lost, none doubled.
    """

    def __init__(self, directory: Path, purge_step: int | None = None):
        """purge_step: TensorBoard forgets what earlier sessions wrote for this global step and later ones."""
        from tensorboardX import SummaryWriter  # imports slowly; only runs need it

        self.path = directory / "metrics.jsonl"
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)

    def write(self, stage: str, step: int, global_step: int, values: Mapping[str, float]) -> None:
        row = {"stage": stage, "step": step, **{name: round_for_json(value) for name, value in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, global_step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def rewind(path: Path, rows: int) -> None:
    """Keep the first `rows` lines of a metrics file, in place: an open Writer goes on behind them."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        os.truncate(path, sum(map(len, lines[:rows])))


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def round_for_json(value: Any) -> float | int | None:
    """Seven significant digits: what a float32 holds. JSON has no nan and no infinity: they become null."""
    if isinstance(value, int):
        return value
    return float(f"{float(value):.7g}") if math.isfinite(value) else None
