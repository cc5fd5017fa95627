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
            paid = score.get("reward", score["em"])
            numbers = [] if paid == score["em"] else [f"reward {paid:.3f}"]
            numbers += [f"EM {score['em']:.3f} [{low:.3f}, {high:.3f}]", f"F1 {score['f1']:.3f}", *bounds]
            numbers.append(
                f"{score['searches']:.2f} searches" + (f" for {score['hops']:.2f} hops" if "hops" in score else "")
            )
            lines.append(f"{title} on {score['questions']} test questions: {', '.join(numbers)}")
    return lines


def draw_curve(path: Path, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Two panels over the main stage's updates: exact match of the sampled episodes and on held-out questions, framed
    by the bounds; and searches a question beside the hops it has.

    rows: those of metrics.jsonl.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    main = [row for row in rows if row["stage"] != "warm_up"]
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_lines(above, main, "em")
    draw_lines(below, main, "searches")
    steps = max((row["step"] for row in main), default=1)
    draw_scores(above, result, steps)
    for name in ("oracle", "random"):
        if result.get(name):
            em = result[name]["em"]
            above.axhline(em, color="grey", lw=1, ls="--", zorder=0)
            above.annotate(f"{name} {em:.2f}", (0.5, em), xycoords=("axes fraction", "data"), xytext=(0, 3),
                           textcoords="offset points", ha="center", fontsize=8, color="grey")  # fmt: skip
    hops = next((result[name]["hops"] for name in SCORED if "hops" in result.get(name, {})), None)
    if hops is not None:
        below.axhline(hops, color="grey", lw=1, ls="--", zorder=0)
        below.annotate(f"hops {hops:.2f}", (0.01, hops), xycoords=("axes fraction", "data"), xytext=(0, 3),
                       textcoords="offset points", fontsize=8, color="grey")  # fmt: skip
    above.set(
        ylabel="exact match", ylim=(-0.03, 1.08), xlim=(-0.15 * steps, 1.15 * steps), title=result["config"]["name"]
    )
    below.set(xlabel="updates", ylabel="searches\na question")
    below.set_ylim(0, 1.15 * below.get_ylim()[1])
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.25)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def draw_lines(axes: Any, main: Sequence[Mapping[str, Any]], metric: str) -> None:
    """A metric of the training episodes at every update, and of greedy ones on the validation questions."""
    sampled = [(row["step"], row[metric]) for row in main if "rollout/tokens" in row and row.get(metric) is not None]
    held_out = [(row["step"], row[f"validation/{metric}"]) for row in main if f"validation/{metric}" in row]
    if sampled:
        axes.plot(*zip(*sampled), color="#9bb8d3", lw=1, label="training questions, sampled")
    if held_out:
        axes.plot(*zip(*held_out), color="#1f4e79", lw=2, marker="o", ms=3, label="validation questions, greedy")


def draw_scores(axes: Any, result: Mapping[str, Any], steps: int) -> None:
    """The test scores outside the curves: the warm start's on the left, the final ones on the right."""
    label: str | None = "test questions, greedy, 95 % interval"
    for name, x, side in (("warm_start", 0, -1), ("final", steps, 1)):
        if result.get(name):
            em, (low, high) = result[name]["em"], result[name]["em_interval"]
            x += side * 0.02 * steps
            axes.errorbar([x], [em], [[em - low], [high - em]], fmt="D", ms=5, color="#c0392b", capsize=4, label=label)
            axes.annotate(f"{SCORED[name]}\n{em:.2f}", (x, em), textcoords="offset points", xytext=(side * 7, 0),
                          ha="right" if side < 0 else "left", va="center", fontsize=8, color="#c0392b")  # fmt: skip
            label = None  # once in the legend
