"""One stage's learning: groups of episodes in, an update out: reward, pack, prepare, accumulate, apply."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlrag.console import say
from rlrag.evaluate import mean_reward
from rlrag.metrics import Metrics, merge
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer
from rlrag.objectives.update import TrainState, Update, build_optimizer, build_prepare, build_schedule
from rlrag.packing import Packed, RowsExhausted, Shape
from rlrag.packing import pack as pack_rows
from rlrag.recipes.recipe import Stage
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Group


class Learner:
    """The policy's train state in one stage, and the three programs that change it."""

    def __init__(self, stage: Stage, a: Architecture, mesh: jax.sharding.Mesh, num_kept: int, params: Transformer):
        """params are taken over: what begins the stage, and its reference where the objective wants one."""
        update, objective = stage.settings.update, stage.recipe.learn["policy"]
        self.stage, self.num_kept, self.max_micro = stage, num_kept, update.max_micro
        steps = stage.steps * update.minibatches * update.epochs
        schedule = build_schedule(
            update.schedule, update.learning_rate, update.warm_up_steps, steps, update.final_fraction
        )
        optimizer = build_optimizer(
            schedule, b1=update.b1, b2=update.b2, weight_decay=update.weight_decay, clip_norm=update.clip_norm
        )
        self.update = Update(a, objective, optimizer, schedule, mesh)
        questions, episodes = stage.settings.questions, stage.settings.questions * stage.settings.group_size
        self.prepare = build_prepare({"policy": a}, {"policy": objective}, stage.recipe.credit, questions, episodes)
        self.reference = jax.tree.map(lambda x: x.copy(), params) if objective.needs_reference else None
        self.state: TrainState = self.update.initialize(params)
        self.roles = {name: index for index, name in enumerate(stage.recipe.roles)}

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """One batch: an optimizer step a minibatch. step: number of the batch, which seeds the order of minibatches.
        Returns what the batch was like and what the update did, by name."""
        update = self.stage.settings.update
        paid = [self.stage.recipe.reward(group) for group in groups]
        packed = self.pack(groups, paid)
        batch = {"policy": self.update.put(packed.batch)}
        num_micro = {"policy": np.int32(packed.num_micro)}
        prepared = self.prepare({"policy": self.state.params}, {"policy": self.reference}, batch, num_micro)
        sums: Metrics | None = None
        applied = []
        for epoch in range(update.epochs):
            for micros in minibatches(packed.num_micro, update.minibatches, seed=(step, epoch)):
                self.state, new, report = self.update.step(
                    self.state, prepared.batches["policy"], prepared.counts["policy"], micros
                )
                sums = new if sums is None else merge(sums, new)
                applied.append(report)
        assert sums is not None
        metrics, reports, credit = jax.device_get(({k: v.value() for k, v in sums.items()}, applied, prepared.metrics))
        values = {name: float(value) for name, value in metrics.items()}
        values |= {name: float(value.value()) for name, value in credit.items()}
        values |= {name: float(np.mean([getattr(r, name) for r in reports])) for name in ("grad_norm", "learning_rate")}
        values["skipped"] = float(np.sum([r.skipped for r in reports]))
        return values | describe(groups, paid, packed)

    def pack(self, groups: Sequence[Group], paid: Sequence[Sequence[Paid]]) -> Packed:
        """Rows of the batch. Where they are too few there are twice as many from then on, and that is said: every
        program is compiled once more."""
        update = self.stage.settings.update
        while True:
            shape = Shape(
                update.micro_rows, update.row_tokens, update.max_segments, self.max_micro, self.num_kept,
                len(self.stage.recipe.rewards),
            )  # fmt: skip
            try:
                return pack_rows(groups, paid, self.roles, self.stage.recipe.rewards, shape)
            except RowsExhausted as full:
                self.max_micro *= 2
                say(
                    f"{full}: room for {self.max_micro} from here on (one compilation more; "
                    f"--config.{self.stage.name}.update.max_micro={self.max_micro} has it from the start)"
                )

    # -- saving -------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Any]:
        return {"state": self.state} | ({} if self.reference is None else {"reference": self.reference})

    def restore(self, arrays: Mapping[str, Any], max_micro: int) -> None:
        self.state, self.reference, self.max_micro = arrays["state"], arrays.get("reference"), max_micro


def minibatches(num_micro: int, count: int, seed: tuple[int, int]) -> list[list[int]]:
    """Micro-batches in random order, cut into `count` parts (fewer if there are not that many)."""
    if count == 1:
        return [list(range(num_micro))]
    order = np.random.default_rng(seed).permutation(num_micro)
    return [part.tolist() for part in np.array_split(order, min(count, num_micro))]


def describe(groups: Sequence[Group], paid: Sequence[Sequence[Paid]], packed: Packed) -> dict[str, float]:
    """What the episodes of a batch were like."""
    trajectories = [t for group in groups for t in group.trajectories]
    payments = [payment for group in paid for payment in group]
    values = {
        "reward": mean_reward(groups, paid),
        "fill": packed.fill,
        "micro_batches": packed.num_micro,
        "trained_tokens": int((packed.batch.act > 0).sum()),
        "left_out": packed.left_out,
        "searches": float(np.mean([t.num_searches for t in trajectories])),
    }
    for name in sorted({name for payment in payments for name in payment.metrics}):
        values[name] = float(np.mean([payment.metrics[name] for payment in payments if name in payment.metrics]))
    for status in sorted({t.status for t in trajectories}):
        values[f"status/{status}"] = float(np.mean([t.status == status for t in trajectories]))
    return values
