"""What a run leaves for a reader: the learning curve and the versions it ran with."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "rlrag")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def draw_curve(workdir: Path, result: dict[str, Any]) -> None:
    """curve.png: EM of the sampled episodes and on held-out questions over the main stage, framed by the bounds."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
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
            axes.errorbar([x], [middle], [[middle - low], [high - middle]], fmt="D", color="#c0392b", capsize=4, label=label)
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
    figure.savefig(workdir / "curve.png")
