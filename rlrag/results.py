"""What a study found, as JSON; and from that JSON alone the table and the plot that people read."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.statistics import t_interval, two_level_bootstrap
from rlrag.study import CONTINUED, LEAST_SEEDS, Cell, Study, read_rows

BEST = "best_validation_em"
COLLAPSE = 0.1  # below the best validation score


def gather(study: Study, cells: Mapping[tuple[str, int], Cell], command: str, commit: str | None) -> dict[str, Any]:
    """The JSON of a study: finished cells only; `missing` names the others."""
    results = {key: cell.result for key, cell in cells.items()}
    done = {key: result for key, result in results.items() if result is not None}
    if not done:
        raise ValueError(f"no cell of {study.name} is finished: see the log.txt of its cells")
    arms: dict[str, dict[str, Any]] = {name: {} for name in study.arms}
    for (arm, seed), result in done.items():
        values = {metric: result["final"][metric] for metric in study.metrics}
        arms[arm][str(seed)] = values | {
            "seconds": round(result["seconds"], 1),
            "weights_sha256": result["weights_sha256"],
            **best_of(cells[arm, seed]),
        }
    first = next(iter(done.values()))
    starts = {seed: result["warm_start"] for (_, seed), result in done.items()}
    p = study.primary
    return {
        "name": study.name,
        "title": study.title,
        "command": command,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": first["device"],
        "versions": first["versions"],
        "primary": {"metric": p.metric, "contrast": [p.better, p.baseline], "threshold": p.threshold},
        "arms": {name: seeds for name, seeds in arms.items() if seeds},
        "contrasts": [
            contrast for a, b in study.all_contrasts if (contrast := compare(study, cells, arms, a, b)) is not None
        ],
        "bounds": {
            "oracle": (first["oracle"] or {}).get(p.metric),
            "random": (first["random"] or {}).get(p.metric),
            "warm_start": float(np.mean([start[p.metric] for start in starts.values()])),
        },
        "missing": [cells[key].name for key in cells if key not in done],
        "curves": {name: curves(cells, name, study.arms[name].seeds, p.metric) for name in study.arms if arms[name]},
    }


def best_of(cell: Cell) -> dict[str, float]:
    """How the training went: its best validation score, and the number of alarms."""
    rows = read_rows(cell.directory / "metrics.jsonl")
    scores = [row["validation/em"] for row in rows if "validation/em" in row]
    return {
        BEST: max(scores, default=float("nan")),
        "alarms": sum(row.get("alarms", 0) for row in rows),
    }


def compare(study: Study, cells: Mapping[tuple[str, int], Cell], arms: Mapping[str, Any], a: str, b: str) -> dict[str, Any] | None:  # fmt: skip # noqa: E501
    """The contrast a - b over the seeds that both have; None where there are fewer than two."""
    metric = study.primary.metric
    seeds = sorted(int(seed) for seed in arms[a].keys() & arms[b].keys())
    if len(seeds) < 2:
        return None
    differences = [arms[a][str(seed)][metric] - arms[b][str(seed)][metric] for seed in seeds]
    tables = [questions(cells, arm, seeds, metric) for arm in (a, b)]
    if len(seeds) >= LEAST_SEEDS and all(table is not None for table in tables):
        interval, method = two_level_bootstrap(*tables), "two-level bootstrap (seed x question), 10,000 resamples"  # type: ignore[arg-type]
    else:
        interval, method = t_interval(differences), "t-interval of paired differences"
    return {
        "a": a, "b": b, "metric": metric, "difference": float(np.mean(differences)), "interval": list(interval),
        "n": len(seeds), "method": method,
    }  # fmt: skip


def questions(cells: Mapping[tuple[str, int], Cell], arm: str, seeds: Sequence[int], metric: str) -> np.ndarray | None:
    """Scores [seeds, questions]; None where the metric is not one of single questions."""
    table = [read_rows(cells[arm, seed].directory / "predictions_final.jsonl") for seed in seeds]
    if not all(rows and metric in rows[0] for rows in table) or len({len(rows) for rows in table}) > 1:
        return None
    return np.array([[row[metric] for row in rows] for rows in table], float)


def curves(cells: Mapping[tuple[str, int], Cell], arm: str, seeds: Sequence[int], metric: str) -> dict[str, Any]:
    """Validation scores by step of the main stage, seed by seed."""
    found: dict[str, Any] = {}
    for seed in seeds:
        rows = [row for row in read_rows(cells[arm, seed].directory / "metrics.jsonl") if row["stage"] != "warm_up"]
        points = [(row["step"], row[f"validation/{metric}"]) for row in rows if f"validation/{metric}" in row]
        if points:
            found[str(seed)] = points
    return found


# -- what people read -------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> str:
    low, high = t_interval(values)
    mean = float(np.mean(values))
    return f"{mean:.3f}" if low != low else f"{mean:.3f} [{max(low, 0):.3f}, {high:.3f}]"


def verdict(primary: Mapping[str, Any], contrast: Mapping[str, Any] | None) -> str:
    """In words: was the threshold met?"""
    a, b = primary["contrast"]
    asked = f"{a} above {b} in {primary['metric']} by more than {primary['threshold']:g}"
    if contrast is None:
        return f"Asked: {asked}. Not answered yet: cells are missing."
    low, high = contrast["interval"]
    found = f"difference {contrast['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {contrast['n']} seeds"
    if low > primary["threshold"]:
        return f"Asked: {asked}. **Yes**: {found}."
    if high < primary["threshold"]:
        return f"Asked: {asked}. **No**: {found}."
    return f"Asked: {asked}. **Not shown**: {found}; the interval holds the threshold."


def collapses(result: Mapping[str, Any]) -> list[str]:
    """Cells that learned and lost it again, with what they had and what was left."""
    metric = result["primary"]["metric"]
    return [
        f"{arm}:{seed} ({values[BEST]:.3f}, then {values[metric]:.3f})"
        for arm, seeds in result["arms"].items()
        for seed, values in seeds.items()
        if BEST.endswith(metric) and values.get(BEST, 0.0) - values[metric] >= COLLAPSE
    ]


def report(result: Mapping[str, Any], plot: str) -> str:
    """The Markdown page of a study, from its JSON alone. plot: file name of the picture beside it."""
    primary, metric = result["primary"], result["primary"]["metric"]
    contrasts = {(c["a"], c["b"]): c for c in result["contrasts"]}
    bounds = result["bounds"]
    lines = [f"# {result['title']}", "", verdict(primary, contrasts.get(tuple(primary["contrast"]))), ""]
    if result["missing"]:
        lines += [f"**Partial**: {len(result['missing'])} cells are missing: {', '.join(result['missing'])}.", ""]
    lines += [f"![learning curves]({plot})", ""]
    framed = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in bounds.items() if value is not None)
    others = [name for name in next(iter(next(iter(result["arms"].values())).values())) if name not in NOT_COLUMNS]
    names = [metric, *(name for name in others if name != metric)]
    lines += [f"Bounds ({metric}): {framed}. Means over seeds with 95 % t-intervals of {metric}.", ""]
    columns = [metric, "worst seed", *names[1:]]
    lines += ["| arm | seeds | " + " | ".join(columns) + " | s |", "|---|---:|" + "---:|" * (len(columns) + 1)]
    ranked = sorted(result["arms"].items(), key=lambda item: -np.mean([v[metric] for v in item[1].values()]))
    for arm, seeds in ranked:
        cells = [mean_interval([values[metric] for values in seeds.values()])]
        cells += [f"{min(values[metric] for values in seeds.values()):.3f}"]
        cells += [f"{np.mean([values[name] for values in seeds.values()]):.3f}" for name in names[1:]]
        seconds = np.mean([values["seconds"] for values in seeds.values()])
        label = f"{arm} (baseline)" if arm == CONTINUED else arm
        lines.append(f"| {label} | {len(seeds)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    fell = collapses(result)
    if fell:
        lines += ["", f"Ended {COLLAPSE} or more below the best validation score of their run: {', '.join(fell)}."]
    lines += ["", "| contrast | difference | 95 % interval | seeds | method |", "|---|---:|---|---:|---|"]
    for c in result["contrasts"]:
        low, high = c["interval"]
        reading = "" if low > 0 or high < 0 else " (holds 0)"
        lines.append(
            f"| {c['a']} - {c['b']} | {c['difference']:+.3f} | [{low:+.3f}, {high:+.3f}]{reading} | {c['n']} | {c['method']} |"  # noqa: E501
        )
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines += ["", f"`{result['command']}`, {result['date']}, {result['device']}. {versions}. "]
    lines[-1] += f"Config at commit {result['commit'][:12]}." if result["commit"] else "**Config not committed.**"
    return "\n".join(lines) + "\n"


NOT_COLUMNS = ("seconds", "weights_sha256")


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Learning curves of every arm, mean and range over seeds, framed by the bounds; one small panel an arm."""
    from matplotlib.figure import Figure

    arms = [name for name in result["arms"] if result["curves"].get(name)]
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.3 * rows + 0.4), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).reshape(-1)
    metric, bounds = result["primary"]["metric"], result["bounds"]
    baseline = band(result["curves"].get(CONTINUED, {}))
    for panel, arm in zip(panels, arms):
        steps, low, mean, high = band(result["curves"][arm])
        if arm != CONTINUED and len(baseline[0]):
            panel.plot(baseline[0], baseline[2], color="tab:gray", lw=1.2, label=CONTINUED)
        panel.fill_between(steps, low, high, color="tab:blue", alpha=0.25, lw=0)
        panel.plot(steps, mean, color="tab:blue", lw=1.8, label=arm)
        for name, style in (("oracle", "--"), ("warm_start", "-."), ("random", ":")):
            if bounds[name] is not None:
                panel.axhline(bounds[name], color="black", lw=0.8, ls=style, alpha=0.6, label=name)
        panel.set_title(f"{arm}, {len(result['curves'][arm])} seeds", fontsize=9)
        panel.set_ylim(-0.03, 1.05)
        panel.tick_params(labelsize=8)
    for panel in panels[len(arms) :]:
        panel.axis("off")
    for panel in panels[:: columns or 1]:
        panel.set_ylabel(f"validation {metric}", fontsize=8)
    handles, labels = panels[-1 if len(arms) == len(panels) else len(arms) - 1].get_legend_handles_labels()
    shown = [
        (h, "arm (mean, range)" if label == arms[-1] else label.replace("_", " ")) for h, label in zip(handles, labels)
    ]
    figure.legend(*zip(*shown), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(result["title"], fontsize=10)
    figure.supxlabel("updates", fontsize=8)
    figure.savefig(path)


def band(curves: Mapping[str, Sequence[Sequence[float]]]) -> tuple[np.ndarray, ...]:
    """Steps that all seeds have, with the least, mean and greatest score."""
    tables = [dict((int(step), value) for step, value in points) for points in curves.values()]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = np.array([[table[step] for step in steps] for table in tables]).reshape(len(tables), len(steps))
    if not len(steps):
        return (np.zeros(0),) * 4
    return np.array(steps), values.min(0), values.mean(0), values.max(0)
