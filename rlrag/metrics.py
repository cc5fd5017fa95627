"""Metrics that add exactly, and where they are written.

A mean is carried as (total, count) and divided once at the end, so that micro-batches, packing and device count change
nothing.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sum:
    """A mean in two parts: total and the count it is over; several means where these are vectors."""

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


@flax.struct.dataclass
class Least:
    """The smallest value seen."""

    lowest: jax.Array

    def merge(self, other: "Least") -> "Least":
        return Least(jnp.minimum(self.lowest, other.lowest))

    def value(self) -> jax.Array:
        return self.lowest


Metric = Sum | Peak | Least
Metrics = dict[str, Metric]


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> Metrics:
    """The metrics of both, which carry the same names."""
    assert first.keys() == second.keys(), f"metrics differ in {sorted(first.keys() ^ second.keys())}"
    return {name: first[name].merge(second[name]) for name in first}  # type: ignore[arg-type]


def nothing(like: Mapping[str, Metric]) -> Metrics:
    """What changes nothing when it is merged with metrics of these names and shapes, on the host."""
    start = {Sum: 0.0, Peak: -np.inf, Least: np.inf}

    def one(metric: Metric) -> Metric:
        return jax.tree.map(lambda leaf: np.full(leaf.shape, start[type(metric)], np.float32), metric)

    return {name: one(metric) for name, metric in like.items()}


def numbers(metrics: Mapping[str, Metric], labels: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Metrics as numbers, on the host. A vector "NAME_by_AXIS" becomes NAME/LABEL for each label of the axis that was
    counted."""
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        value = np.asarray(metric.value())
        if value.ndim == 0:
            values[name] = float(value)
            continue
        assert isinstance(metric, Sum)
        stem, _, axis = name.rpartition("_by_")
        counted = zip(labels[axis], value, np.asarray(metric.count))
        values |= {f"{stem}/{label}": float(number) for label, number, count in counted if count > 0}
    return values


class Writer:
    """Numbers by step to `metrics.jsonl` and TensorBoard events in a run's directory.

    A row is one JSON object {"step", "stage", name: value, ...}, written whole and flushed. After a restore `rewind`
    drops the rows of steps that will be played again: none is lost, none doubled.
    """

    def __init__(self, directory: Path, purge_step: int | None = None, wandb_project: str = "", name: str = ""):
        """purge_step: TensorBoard forgets what earlier sessions wrote for this global step and later ones.
        wandb_project: metrics go to a run of that Weights & Biases project too, called `name`; one run a directory."""
        from tensorboardX import SummaryWriter  # imports slowly; only runs need it

        self._wandb = open_wandb(wandb_project, name, directory) if wandb_project else None
        self.path = directory / "metrics.jsonl"
        self._file = self.path.open("a")
        # Its own thread: Ctrl-C interrupts the main one, and a writer interrupted within its queue never closes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._events = self._thread.submit(
            SummaryWriter, str(directory / "tensorboard"), purge_step=purge_step
        ).result()
        self._written: Future[None] | None = None

    def write(self, stage: str, step: int, global_step: int, values: Mapping[str, float]) -> None:
        row = {"stage": stage, "step": step, **{name: round_for_json(value) for name, value in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._written is not None:
            self._written.result()  # raises what went wrong
        self._written = self._thread.submit(self._write_events, stage, global_step, dict(values))

    def _write_events(self, stage: str, global_step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, global_step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in values.items()}, step=global_step)

    def close(self) -> None:
        with contextlib.ExitStack() as all_of_them:
            if self._wandb is not None:
                all_of_them.callback(self._wandb.finish)
            all_of_them.callback(self._thread.shutdown)
            all_of_them.callback(lambda: self._thread.submit(self._close_events).result())
            all_of_them.callback(self._file.close)

    def _close_events(self) -> None:
        try:
            self._events.close()
        except OSError:  # a full disk: tensorboardX would try again as the process ends, and print tracebacks
            writer: Any = self._events.file_writer.event_writer  # type: ignore[union-attr]
            writer.close = lambda: None
            writer._worker.stop()
            raise


def open_wandb(project: str, name: str, directory: Path) -> Any:
    """A Weights & Biases run that the same directory goes on with. Its own settings (WANDB_MODE=offline, ...) hold."""
    try:
        import wandb  # type: ignore[import-not-found]  # an optional extra
    except ImportError:
        raise ValueError(
            f"wandb is {project!r}, but the package is not installed: pip install 'rlrag[wandb]', or leave wandb empty"
        ) from None
    identity = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=name, dir=str(directory), id=identity, resume="allow")


def rewind(path: Path, rows: int) -> None:
    """Keep the first `rows` lines of a metrics file, in place: an open Writer goes on behind them."""
    if path.exists():
        with path.open("rb") as file:  # line by line: logs of episodes grow large
            kept = sum(len(line) for line in itertools.islice(file, rows))
        os.truncate(path, kept)


def num_rows(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def round_for_json(value: Any) -> float | int | None:
    """Seven significant digits: what a float32 holds. JSON has no nan and no infinity: they become null."""
    if isinstance(value, int):
        return value
    return float(f"{float(value):.7g}") if math.isfinite(value) else None
