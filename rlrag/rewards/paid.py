"""What a reward hands back for one trajectory: numbers by name, never tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rlrag.trajectory import Group


@dataclass(slots=True)
class Paid:
    """Rewards of one trajectory.

    per_call: named rewards, one number for each stream in `trajectory.streams` (nan: this call is not paid by it).
    per_token: additive token terms by stream name, each [num_tokens of that stream]; empty for most methods.
    metrics: plain numbers to average and log ("em", "f1", ...), never learned from.
    """

    per_call: dict[str, list[float]]
    per_token: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


Reward = Callable[[Group], list[Paid]]


def combined(*parts: tuple[Reward, float]) -> Reward:
    """Several rewards, each multiplied by its factor; their names stay apart, metrics come unscaled from all. A factor
    of 0 is for metrics alone: nothing is paid, under no name."""

    def reward(group: Group) -> list[Paid]:
        total = [Paid({}) for _ in group.trajectories]
        for part, factor in parts:
            for sum_, paid in zip(total, part(group), strict=True):
                sum_.metrics |= paid.metrics
                if factor == 0:
                    continue
                sum_.per_call |= {name: [factor * value for value in values] for name, values in paid.per_call.items()}
                sum_.per_token |= {name: factor * values for name, values in paid.per_token.items()}
        return total

    return reward
