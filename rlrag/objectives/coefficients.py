"""Coefficients: what a loss term or a penalty weighs, fixed or adapted from step to step, on the host."""

from collections.abc import Mapping
from typing import NamedTuple

LARGEST_ERROR = 0.2  # of the controller: its proportional error is clipped there


class Coefficient(NamedTuple):
    """value: at the start. metric, target, horizon: where a target is given, the coefficient follows that metric of
    every step: it grows while the metric is above target, by at most 20 % in `horizon` episodes."""

    value: float
    metric: str = ""
    target: float = 0.0
    horizon: int = 10_000

    def following(self, now: float, values: Mapping[str, float], episodes: int) -> float:
        """The coefficient after a step of `episodes` episodes whose metrics are `values`:
        c (1 + e episodes / horizon), e = clip(metric / target - 1, -0.2, 0.2) (Ziegler et al. 2019, arXiv 1909.08593,
        section 2.2)."""
        if not self.target:
            return now
        error = values[self.metric] / self.target - 1
        return now * (1 + max(-LARGEST_ERROR, min(LARGEST_ERROR, error)) * episodes / self.horizon)
