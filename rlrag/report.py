"""What a run leaves for a reader: its scores in words, the learning curve, and the versions it ran with."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "rlrag")
SCORED = {"warm_start": "warm start", "final": "final"}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def describe(result: Mapping[str, Any]) -> list[str]:
    """A line for each score in a result, framed by those of the oracle and the random policy."""
    bounds = [f"{name} {result[name]['em']:.3f}" for name in ("oracle", "random") if result.get(name)]
    lines = []
    for name, title in SCORED.items():
        if name in result:
            score = result[name]
            low, high = score["em_interval"]
            numbers = [f"EM {score['em']:.3f} [{low:.3f}, {high:.3f}]", f"F1 {score['f1']:.3f}", *bounds]
            numbers.append(
                f"{score['searches']:.2f} searches" + (f" for {score['hops']:.2f} hops" if "hops" in score else "")
            )
            lines.append(f"{title} on {score['questions']} test questions: {', '.join(numbers)}")
    return lines


def draw_curve(path: Path, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """EM of the sampled episodes and on held-out questions over the main stage, framed by the bounds.

    rows: those of metrics.jsonl.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    main = [row for row in rows if row["stage"] != "warm_up"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if any("rollout/tokens" in row for row in main):
        axes.plot([r["step"] for r in main], [r["em"] for r in main], color="#9bb8d3", lw=1, label="sampled, training")
    held_out = [(r["step"], r["validation/em"]) for r in main if "validation/em" in r]
    steps = max((r["step"] for r in main), default=0)
    if held_out:
        axes.plot(*zip(*held_out), color="#1f4e79", lw=2, marker="o", ms=3, label="greedy, validation questions")
    for name, x in (("warm_start", 0), ("final", steps)):
        if result.get(name):
            low, high = result[name]["em_interval"]
            middle = result[name]["em"]
            label = "greedy, test questions, 95 % interval" if name == "final" else None
            axes.errorbar(
                [x], [middle], [[middle - low], [high - middle]], fmt="D", color="#c0392b", capsize=4, label=label
            )
            axes.annotate(f"{middle:.2f}", (x, middle), textcoords="offset points", xytext=(8, -12), color="#c0392b")
    for name in ("oracle", "random"):
        if result.get(name):
            axes.axhline(result[name]["em"], color="grey", lw=1, ls="--")
            axes.annotate(name, (steps, result[name]["em"]), ha="right", va="bottom", fontsize=8, color="grey")
    axes.set(xlabel="updates", ylabel="exact match", ylim=(-0.02, 1.05), title=result["config"]["name"])
    axes.grid(alpha=0.25)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="center right", frameon=False)
    figure.savefig(path)
