"""A watch for collapse: metrics that crossed their bound for several steps in a row raise an alarm that names them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlrag.config import Watch

SMOOTHING = 0.8  # of the running mean reward, a step
SETTLED = 10  # steps before a drop of the reward is one


def bounds(watch: Watch) -> tuple[tuple[str, float, str, bool], ...]:
    """The name of a bound, its value (0: none), the metric it is on, and whether it is an upper one."""
    return (
        ("max_gap", watch.max_gap, "sampler_learner_gap", True),
        ("max_ratio", watch.max_ratio, "ratio_max", True),
        ("min_entropy", watch.min_entropy, "entropy", False),
        ("max_zero_variance", watch.max_zero_variance, "zero_variance_groups", True),
        ("min_legal", watch.min_legal, "legal", False),
        ("max_truncated", watch.max_truncated, "truncated", True),
        ("max_grad_norm", watch.max_grad_norm, "grad_norm", True),
    )


@dataclass
class Alarm:
    step: int
    metric: str
    value: float
    text: str


@dataclass
class Watchman:
    """What has been seen so far; `state` is saved and restored."""

    bounds: Watch
    state: dict[str, Any] = field(default_factory=lambda: {"streaks": {}, "reward": None, "best": None, "steps": 0})

    def look(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms of a step: each is raised when its streak reaches `patience`, and again only after it ended."""
        alarms = []
        for name, bound, metric, upper in bounds(self.bounds):
            if bound and metric in values:
                value = values[metric]
                # A nan is beyond every bound.
                crossed = not (value <= bound if upper else value >= bound)
                side = "above" if upper else "below"
                alarms += self._streak(step, metric, value, crossed, f"{side} {bound:g} (watch.{name})")
        if "reward" in values:
            alarms += self._reward(step, values["reward"])
        if values.get("skipped"):
            text = f"step {step}: {values['skipped']:.0f} update(s) skipped, their gradient was not finite"
            alarms.append(Alarm(step, "skipped", values["skipped"], text))
        return alarms

    def _reward(self, step: int, reward: float) -> list[Alarm]:
        s = self.state
        s["reward"] = reward if s["reward"] is None else SMOOTHING * s["reward"] + (1 - SMOOTHING) * reward
        s["steps"] += 1
        if s["steps"] >= SETTLED:
            s["best"] = s["reward"] if s["best"] is None else max(s["best"], s["reward"])
        bound = self.bounds.max_reward_drop
        if not bound or not s["best"] or s["best"] <= 0:
            return []
        lost = 1 - s["reward"] / s["best"]
        told = f"{lost:.0%} below its best, {s['best']:.3g} (watch.max_reward_drop)"
        return self._streak(step, "reward", s["reward"], lost > bound, told)

    def _streak(self, step: int, metric: str, value: float, crossed: bool, told: str) -> list[Alarm]:
        streaks, patience = self.state["streaks"], self.bounds.patience
        streaks[metric] = streaks.get(metric, 0) + 1 if crossed else 0
        if streaks[metric] != patience:
            return []
        since = f"for {patience} steps" if patience > 1 else "now"
        return [Alarm(step, metric, value, f"step {step}: {metric} is {value:.4g} {since}, {told}")]
