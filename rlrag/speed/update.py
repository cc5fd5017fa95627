"""Learning from groups of episodes, played or made up, and what that takes against its floor.

GRPO without a reference: prepare scores nothing, since the sampler's log-probs are exact. What learns is chosen by what
fits: all parameters with the optimizer, their gradients alone (steps are then not taken, and that is said), or
adapters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from rlrag.batch import Batch
from rlrag.mesh import make_mesh
from rlrag.metrics import Metrics, numbers
from rlrag.model.architecture import Adapters, Architecture
from rlrag.model.parameters import Transformer, furnished, shardings
from rlrag.objectives.credit import group_relative
from rlrag.objectives.losses import MAX_TURNS, surrogate
from rlrag.objectives.optimizer import build_optimizer, build_schedule
from rlrag.objectives.scoring import score
from rlrag.objectives.update import Prepared, Scorer, Update, build_prepare
from rlrag.packing import Packed, RowsExhausted, Shape, pack
from rlrag.rewards.paid import Paid
from rlrag.rollout.engine import stream_uid
from rlrag.speed.floor import Rates, Rows, Work, learning, state_bytes, stepping
from rlrag.speed.workload import ROLE
from rlrag.trajectory import Group

MODEL = "m"
ALL, GRADIENTS, ADAPTERS = "all", "gradients", "adapters"  # what learns
SPARE = 0.8  # of the memory that parameters, gradients and optimizer may fill; the rest is for activations
RANK = 16


@dataclass(frozen=True)
class RowSizes:
    """Of a micro-batch."""

    rows: int
    tokens: int
    max_segments: int = 16


def choose(a: Architecture, memory_bytes: int) -> str:
    """What can learn in this much memory."""
    if state_bytes(a, optimizer=True) < SPARE * memory_bytes:
        return ALL
    return GRADIENTS if state_bytes(a, optimizer=False) < SPARE * memory_bytes else ADAPTERS


def packed(groups: Sequence[Group], sizes: RowSizes, learns: str) -> Packed:
    """In as few micro-batches as they take."""
    paid = [[reward(group, t.sample) for t in group.trajectories] for group in groups]
    adapters = {ROLE: 0} if learns == ADAPTERS else {}
    micros = 1
    while True:
        shape = Shape(sizes.rows, sizes.tokens, sizes.max_segments, micros, 0, 1, len(adapters))
        try:
            return pack(groups, paid, {ROLE: 0}, ("score",), shape, adapters)
        except RowsExhausted:
            micros += 1


def reward(group: Group, sample: int) -> Paid:
    """Anything that differs within a group, so that there is something to learn."""
    return Paid({"score": [stream_uid(group.example.id, sample, "reward") % 7 / 7.0]})


def rows_of(made: Packed) -> Rows:
    batch = made.batch
    there = np.asarray(batch.segment) > 0
    # A token sees all of its own stream up to itself, in whichever segments that lies.
    return Rows(int(there.sum()), int((np.asarray(batch.positions)[there] + 1).sum()), made.num_micro)


@dataclass
class Learned:
    """One update: seconds of its parts, and what the objective reported."""

    prepare_s: float
    accumulate_s: float
    apply_s: float
    metrics: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.prepare_s + self.accumulate_s + self.apply_s


class Pupil:
    """A model, and its programs of learning."""

    def __init__(
        self, a: Architecture, params: Transformer, learns: str, episodes: int, groups: int, score: Scorer = score
    ):
        """params are taken over. episodes, groups: of a batch at most; score: as of Update."""
        mesh = make_mesh()
        if learns == ADAPTERS:
            a = replace(a, adapters=Adapters(rank=RANK))
            params = jax.device_put(furnished(params, a, jax.random.key(1)), shardings(a, mesh))
        self.architecture, self.learns = a, learns
        schedule = build_schedule("constant", 1e-6, 0, 1000, 1.0)
        optimizer = build_optimizer(
            schedule, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0, master=a.param_dtype != "float32"
        )
        objective = surrogate()
        self.update = Update(a, objective, optimizer, schedule, mesh, score=score)
        self.prepare = build_prepare(
            {MODEL: a}, {MODEL: objective}, {MODEL: MODEL}, group_relative(), groups, episodes, mesh
        )
        self.state = None if learns == GRADIENTS else self.update.initialize(params)
        self.params = params if self.state is None else None

    @property
    def programs(self) -> dict[str, int]:
        """Compilations of each program so far: 1, or something recompiled."""
        own = {"prepare": self.prepare, "accumulate": self.update.accumulate, "apply": self.update.apply}
        return {name: program._cache_size() for name, program in own.items()}

    @property
    def parameters(self) -> Transformer:
        return self.params if self.state is None else self.state.params  # type: ignore[return-value]

    def learn(self, made: Packed) -> Learned:
        """One batch: prepare, all micro-batches, and a step where there is an optimizer."""
        batch = jax.block_until_ready(self.update.put(made.batch))
        begin = time.perf_counter()
        prepared = jax.block_until_ready(self._prepared(made, batch))
        ready = time.perf_counter()
        grads, sums = jax.block_until_ready(self._accumulated(made, prepared))
        added = time.perf_counter()
        if self.state is not None:
            self.state, _ = jax.block_until_ready(self.update.apply(self.state, grads))
        done = time.perf_counter()
        labels = {"role": [ROLE], "turn": [f"turn_{turn}" for turn in range(MAX_TURNS)]}
        return Learned(ready - begin, added - ready, done - added, numbers(jax.device_get(sums), labels))

    def gradient(self, made: Packed) -> Any:
        """Of a whole batch, on the host."""
        return jax.device_get(self._accumulated(made, self._prepared(made, self.update.put(made.batch)))[0])

    def _prepared(self, made: Packed, batch: Batch) -> Prepared:
        """batch is donated."""
        return self.prepare({MODEL: self.parameters}, {MODEL: None}, {MODEL: batch}, {MODEL: np.int32(made.num_micro)}, {})  # fmt: skip # noqa: E501

    def _accumulated(self, made: Packed, prepared: Prepared) -> tuple[Any, Metrics]:
        """Gradient and metrics of all micro-batches."""
        update, batch, counts = self.update, prepared.batches[MODEL], prepared.counts[MODEL]
        chosen = np.zeros(made.batch.tokens.shape[0], np.float32)
        chosen[: made.num_micro] = 1
        grads, sums = update._zeros(), update.no_metrics(batch)
        for index in range(made.num_micro):
            grads, sums = update.accumulate(
                self.parameters, grads, sums, batch, counts, {}, chosen, np.int32(index), np.int32(0)
            )
        return grads, sums

    def work(self, made: Packed) -> tuple[Work, Work]:
        """Of the gradients, and of the step."""
        whole = self.learns != ADAPTERS
        return learning(self.architecture, rows_of(made), whole), stepping(self.architecture, self.learns == ALL)

    def report(self, made: Packed, learned: Learned, rates: Rates) -> dict[str, Any]:
        gradients, step = self.work(made)
        tokens = rows_of(made).tokens
        floor_s = gradients.seconds(rates) + step.seconds(rates)
        trained = int((np.asarray(made.batch.act) > 0).sum())
        return {
            "learns": self.learns,
            "tokens_per_s": tokens / learned.seconds,
            "trained_tokens_per_s": trained / learned.seconds,
            "seconds": learned.seconds,
            "floor_s": floor_s,
            "share_of_floor": floor_s / learned.seconds,
            "share_of_matrix": gradients.flops / rates.flops / learned.accumulate_s,
            "prepare_s": learned.prepare_s,
            "accumulate_s": learned.accumulate_s,
            "apply_s": learned.apply_s,
            "update_flops": gradients.flops,
            "update_bytes": gradients.moved_bytes + step.moved_bytes,
            "row_tokens": tokens,
            "fill": made.fill,
            "micro_batches": made.num_micro,
        }
