"""A user's function as a reward."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Group, Trajectory


def own_reward(function: Callable[..., Any]) -> Reward:
    """A reward named "reward" from a function of

        (answer: str | None, example: Example) -> float, or {name: float}, whose sum is paid and whose parts are metrics
        (group: Group) -> list[Paid]    one parameter: a whole reward, which says itself what it pays to whom

    The number of its required parameters tells which. ValueError names the function and the example where it raises,
    or returns what is no finite number: a wrong reward stops the run, it is never counted as 0.
    """
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)}"
    required = [
        p for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    if len(required) not in (1, 2):
        raise ValueError(
            f"the reward {name} takes {len(required)} arguments: write reward(answer, example) -> float, or "
            "reward(group) -> list of Paid"
        )

    def pay(trajectory: Trajectory) -> Paid:
        try:
            value = function(trajectory.outcome.answer, trajectory.example)
            parts = {str(k): float(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
            total = sum(parts.values()) if isinstance(value, Mapping) else float(value)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            raise ValueError(f"the reward {name} failed on example {trajectory.example.id!r} ({fault})") from error
        if not math.isfinite(total):
            raise ValueError(f"the reward {name} of example {trajectory.example.id!r} is {total}: give a finite number")
        return Paid({"reward": [total] * len(trajectory.streams)}, metrics=parts)

    def of_group(group: Group) -> list[Paid]:
        try:
            paid = list(function(group))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            raise ValueError(f"the reward {name} failed on example {group.example.id!r} ({fault})") from error
        if len(paid) != len(group.trajectories) or not all(isinstance(p, Paid) for p in paid):
            raise ValueError(
                f"the reward {name} must give one Paid for each of the {len(group.trajectories)} episodes of "
                f"{group.example.id!r}, it gave {len(paid)} of {sorted({type(p).__name__ for p in paid})}"
            )
        return paid

    return of_group if len(required) == 1 else lambda group: [pay(trajectory) for trajectory in group.trajectories]
