"""What one session on an accelerator found, as Markdown: the targets beside the figures, then all figures.

Works on what `kernels.bench` and `launch.bench` write as JSON, and imports no JAX: whoever collects the figures must
not take memory of the device.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
DEVICE = "H200"  # that the targets were set for
# Tokens a second of an update that the targets ask for.
UPDATE_TOKENS = {"3b": 18_000, "7b": 8_000}


@dataclass
class Part:
    """One program of the session, and what it wrote."""

    name: str
    command: str
    seconds: float = 0.0
    outcome: str = "no time"  # "done", or why not
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> Sequence[Row]:
        return self.figures.get("rows", [])


def page(parts: Sequence[Part], command: str, seconds: float, budget_s: float) -> str:
    """The whole document; the first line says on what it ran."""
    about = next((part.figures for part in parts if part.figures.get("device")), {})
    device = about.get("device", "no device that answered")
    where = "Run on" if DEVICE in device else f"Not yet run on an {DEVICE}; run on"
    versions = f"JAX {about['jax']}" if "jax" in about else about.get("versions", "")
    lines = [
        f"{where} {device}, {about.get('date', '')}, {versions}: `{command}`, {seconds:.0f} of {budget_s:.0f} s.",
        "",
        "# Kernels and speed on one accelerator",
        "",
        "Ceilings are a large bare matrix product and a pass over memory, measured between the runs.",
        "docs/guides/speed.md says what the columns mean.",
        "",
        "## Targets",
        "",
        *table(("target", "figure", "met"), targets(parts)),
        "",
        "## Parts",
        "",
        *table(
            ("part", "seconds", "outcome", "command"),
            ((p.name, f"{p.seconds:.0f}", p.outcome, f"`{p.command}`") for p in parts),
        ),
    ]
    for part in parts:
        left_out = part.figures.get("left_out", [])
        if part.rows or left_out:
            lines += ["", f"## {part.name}", ""]
            lines += kernel_table(part.rows) if "implementation" in (part.rows or [{}])[0] else model_table(part.rows)
            lines += [f"Left out, no time: {name}." for name in left_out]
    return "\n".join(lines) + "\n"


def table(titles: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), "|" + "---|" * len(titles), *map(line, rows)]


def kernel_table(rows: Sequence[Row]) -> list[str]:
    titles = (
        "operation", "shape", "implementation", "ms", "rate", "share of ceiling", "x time", "x extra memory",
        "extra MiB", "check",
    )  # fmt: skip

    def one(row: Row) -> tuple[str, ...]:
        name = (row["operation"], row["shape"], row["implementation"])
        if row["median_s"] is None:
            return (*name, row["error"], "", "", "", number(row["memory_ratio"]), mebibytes(row["temporary_bytes"]), "")
        unit = "TFLOP/s" if row["bound"] == "matrix" else "TB/s"
        check = number(row["check"]) + (f" ({row['error']})" if row["error"] else "")
        return (
            *name, number(row["median_s"] * 1e3), f"{number(row['rate'] / 1e12)} {unit}", number(row["share"]),
            number(row["time_ratio"]), number(row["memory_ratio"]), mebibytes(row["temporary_bytes"]), check,
        )  # fmt: skip

    return table(titles, map(one, rows))


def model_table(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row if name != "run")
    return table(
        ("", *(row["run"] for row in rows)), ((name, *(number(row.get(name)) for row in rows)) for name in names)
    )


def number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.3f}"


def mebibytes(value: Any) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f}"


# -- targets ----------------------------------------------------------------------------------------------------------


def targets(parts: Sequence[Part]) -> Iterator[tuple[str, str, str]]:
    """Each target of the issue, what was measured, and whether that meets it; "-" where nothing was measured."""
    kernels = [row for part in parts for row in part.rows if "implementation" in row]
    yield from log_prob_targets([row for row in kernels if row["operation"] == "log_prob fwd+bwd"])
    models = {part.name: {row["run"]: row for row in part.rows} for part in parts if part.name not in OPERATION_PARTS}
    for name, runs in models.items():
        yield from model_targets(name, runs)


OPERATION_PARTS = ("log_prob", "decode_attention", "advantage and uncertainty")


def log_prob_targets(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Of the fastest right implementation at each shape."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape and not row["error"] and row["implementation"] != "naive"]
        if not own:
            yield f"log_prob, {shape}", "no implementation ran", "no"
            continue
        best = min(own, key=lambda row: row["median_s"])
        what = f"log_prob forward and backward, {shape}: {best['implementation']}"
        yield target(f"{what}, of the time of its bare products", 1 / best["share"], "<=", 1.15)
        yield target(f"{what}, of the naive path's extra memory", best["memory_ratio"], "<=", 0.1)


def model_targets(name: str, runs: Mapping[str, Row]) -> Iterator[tuple[str, str, str]]:
    def of(run: str, field: str) -> float | None:
        return runs.get(run, {}).get(field)

    search = next((run for run in runs if run.startswith("search") and run != "search 0 ms"), "search")
    yield target(f"{name}: decode, share of the bandwidth floor", of("decode", "share_of_floor"), ">=", 0.7)
    yield target(
        f"{name}: update ({of('update', 'learns')}), share of the matrix ceiling",
        of("update", "share_of_matrix"),
        ">=",
        0.4,
    )
    if name in UPDATE_TOKENS:
        yield target(f"{name}: update, tokens/s", of("update", "tokens_per_s"), ">=", UPDATE_TOKENS[name])
    yield target(f"{name}: rollout with {search}, of the rate without", of(search, "ratio"), ">=", 0.92)
    yield target(f"{name}: sampler against learner, mean nats", of("step", "gap_mean"), "<=", 0.002)


def target(name: str, value: float | None, sense: str, goal: float) -> tuple[str, str, str]:
    if value is None or not math.isfinite(value):
        return f"{name} {sense} {goal:,}", "-", "-"
    met = value <= goal if sense == "<=" else value >= goal
    return f"{name} {sense} {goal:,}", number(value), "yes" if met else "no"
