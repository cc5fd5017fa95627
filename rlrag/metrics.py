"""Metrics that add exactly, and where they are written.

A mean is carried as (total, count) and divided once at the end, so that micro-batches, packing and device count change
nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


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
    return {name: first[name].merge(second[name]) for name in first}  # type: ignore[arg-type]


class Writer:
    """Numbers by step to `metrics.jsonl` and TensorBoard events in a run's directory.

    A row is one JSON object {"step", "stage", name: value, ...}, written whole and flushed. After a restore `rewind`
    drops the rows of steps that will be played again: none is lost, none doubled.
    """

    def __init__(self, directory: Path):
        from tensorboardX import SummaryWriter  # imports slowly; only runs need it

        self.path = directory / "metrics.jsonl"
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"))

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
    """Keep the first `rows` lines of a metrics file."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        if len(lines) > rows:
            path.write_text("".join(lines[:rows]))


def num_rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def round_for_json(value: Any) -> float | int:
    """Seven significant digits: what a float32 holds."""
    if isinstance(value, int):
        return value
    return float(f"{float(value):.7g}")
