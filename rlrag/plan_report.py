"""A plan in words: one forecast as lines, many as a table and as JSON."""

import datetime
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax

from rlrag.devices import Device
from rlrag.hlo import Cost
from rlrag.plan import Assumed, Forecast, Load
from rlrag.survey import Survey

GIB = 2**30
COLUMNS = (
    "shape", "device", "mesh", "weights", "reference", "optimizer", "cache", "decode weights", "rollout activations",
    "gradients", "batch", "update activations", "peak", "left", "micro_rows", "num_slots", "PFLOP", "GB sent",
    "rollout s", "update s", "step s", "tokens/s",
)  # fmt: skip


class Case(NamedTuple):
    """One line of the table."""

    shape: str
    device: str
    found: Survey
    made: Forecast


def gibibytes(count: float) -> str:
    return f"{count / GIB:,.2f}" if abs(count) < 100 * GIB else f"{count / GIB:,.0f}"


def describe(found: Survey, name: str, device: Device, made: Forecast, load: Load, assumed: Assumed) -> str:
    many = math.prod(found.mesh.values())
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    models = ", ".join(f"{model} {count:,}" for model, count in found.parameters.items())
    largest_program = max(made.temporary, key=lambda each: made.temporary[each])
    lines = [f"{many} x {name} ({mesh}); parameters: {models}", "", "GiB a device"]
    lines += [f"  {part:<28}{gibibytes(count):>10}" for part, count in made.memory.items() if count]
    lines += [f"  {'peak, in ' + largest_program:<28}{gibibytes(made.peak):>10}"]
    verdict = "left" if made.fits else "TOO MUCH"
    lines += [f"  {verdict:<28}{gibibytes(abs(made.usable - made.peak)):>10}  of {gibibytes(made.usable)} usable"]
    lines += [
        f"  largest update.micro_rows that fits {made.largest_rows:,} (configured {found.rows:,}); "
        f"rollout.num_slots {made.largest_slots:,} ({found.slots:,})"
    ]
    if found.whole:
        lines += [f"  not divided by the mesh, so whole on every device of an axis: {', '.join(found.whole)}"]
    if not made.timings:
        return "\n".join([*lines, f"  how fast {name} is, is not in the table: no time is predicted"])
    lines += ["", f"{'a device':<12}{'runs':>8}{'TFLOP':>10}{'GB moved':>10}{'GB sent':>9}{'seconds':>10}  bound by"]
    for program, each in made.timings.items():
        sent = sum(each.cost.sent.values())
        lines.append(
            f"{program:<12}{each.runs:>8,}{each.runs * each.cost.flops / 1e12:>10,.1f}"
            f"{each.runs * each.cost.traffic / 1e9:>10,.0f}{each.runs * sent / 1e9:>9,.1f}{each.seconds:>10,.2f}"
            f"  {each.bound}"
        )
    lines += [f"{'a step':<40}{made.seconds:>19,.2f}  {made.step_tokens / made.seconds / many:,.0f} tokens/s a device"]
    return "\n".join([*lines, "", f"sent a step: {sent_a_step(made)}", assumptions(load, assumed), *figures(device)])


def sent_a_step(made: Forecast) -> str:
    """What a device sends in a step, by operation and mesh axis."""
    total = Cost()
    for each in made.timings.values():
        total += each.cost * each.runs
    told = sorted(total.sent.items(), key=lambda item: -item[1])
    return ", ".join(f"{o} over {'+'.join(a)} {n / 1e9:,.1f} GB" for (o, a), n in told) or "none"


def assumptions(load: Load, assumed: Assumed) -> str:
    return (
        f"assumed: {load.episodes:,} episodes a step of {load.sampled:,} sampled and {load.observed:,} observed "
        f"tokens, all slots busy, rows full; {assumed.products:.0%} of the peak in products, "
        f"{assumed.bandwidth:.0%} of the memory's speed, {assumed.links:.0%} of the links'; within a program the three "
        f"overlap, programs do not; {assumed.memory:.0%} of the memory usable; the host, searches and elementwise work "
        "take no time"
    )


def figures(device: Device) -> list[str]:
    """With their sources."""
    rates = {"products": device.flops, "memory": device.bandwidth, "links": device.links, "network": device.network}
    lines = [f"memory: {device.memory_bytes.value / 1e9:,.4g} GB ({device.memory_bytes.source})"]
    lines += [f"{name}: {each.value / 1e9:,.7g} G a second ({each.source})" for name, each in rates.items() if each]
    return [*lines, f"fast links join {device.joined:,} devices"]


# -- many of them -----------------------------------------------------------------------------------------------------

UPDATE = ("prepare", "score", "accumulate", "apply")


def row(case: Case) -> list[str]:
    made, memory = case.made, case.made.memory
    counts = (
        memory["weights"], memory["references"], memory["optimizer"], memory["cache"], memory["decode weights"],
        memory["activations, rollout"], memory["gradients"], memory["batch"], memory["activations, update"], made.peak,
    )  # fmt: skip
    left = gibibytes(made.usable - made.peak)
    update = sum(each.seconds for name, each in made.timings.items() if name in UPDATE)
    flops = sum(each.runs * each.cost.flops for each in made.timings.values())
    sent = sum(each.runs * sum(each.cost.sent.values()) for each in made.timings.values())
    many = math.prod(case.found.mesh.values())
    mesh = " x ".join(map(str, case.found.mesh.values()))
    return [
        case.shape, case.device, mesh, *map(gibibytes, counts), left if made.fits else f"**{left}**",
        f"{made.largest_rows:,}", f"{made.largest_slots:,}", f"{flops / 1e15:.2f}", f"{sent / 1e9:,.0f}",
        f"{made.seconds - update:,.0f}", f"{update:,.0f}", f"{made.seconds:,.0f}",
        f"{made.step_tokens / made.seconds / many:,.0f}",
    ]  # fmt: skip


def table(cases: Sequence[Case], devices: dict[str, Device], load: Load, assumed: Assumed, seconds: float) -> str:
    """Markdown."""
    rows = [row(case) for case in cases]
    rule = ["---" if column in COLUMNS[:3] else "---:" for column in COLUMNS]
    lines = [
        "# What four shapes take of three devices",
        "",
        f"Predicted, not measured: {datetime.date.today()}, JAX {jax.__version__}, `{command()}`, {seconds:,.0f} s on "
        "this machine's CPU.",
        "GiB, PFLOP, GB sent and tokens/s are a device's; PFLOP, GB and seconds a training step's. Decode weights and "
        "their activations are the rollout's; gradients, batch and theirs the update's; all else is there in both: the "
        "peak is the larger of the two. `left` is of the "
        "memory that may be filled, **bold** where the plan does not fit; `micro_rows` and `num_slots` are the largest "
        "that fit, the other as configured, 0 where none does. Mesh: data x model.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (COLUMNS, rule, *rows)),
        "",
        f"{assumptions(load, assumed).capitalize()}.",
    ]
    for name, device in devices.items():
        lines += ["", f"{name}:", "", *(f"- {line}" for line in figures(device))]
    lines += ["", "What a device sends in a step, by operation and mesh axis:", ""]
    lines += [f"- {case.shape}: {sent_a_step(case.made)}" for case in cases if case.device == next(iter(devices))]
    return "\n".join(lines) + "\n"


def command() -> str:
    return f"python -m launch.plan {' '.join(sys.argv[1:])}"


def as_json(cases: Sequence[Case], load: Load, assumed: Assumed) -> dict[str, Any]:
    def costs(case: Case) -> dict[str, Any]:
        return {
            name: {
                "runs": each.runs, "flops": each.cost.flops, "traffic_bytes": each.cost.traffic,
                "sent_bytes": {f"{o} {'+'.join(axes)}": sent for (o, axes), sent in each.cost.sent.items()},
                "seconds": each.seconds, "bound": each.bound,
            }
            for name, each in case.made.timings.items()
        }  # fmt: skip

    return {
        "date": str(datetime.date.today()),
        "jax": jax.__version__,
        "command": command(),
        "load": asdict(load),
        "assumed": asdict(assumed),
        "cases": [
            {
                "shape": case.shape, "device": case.device, "mesh": dict(case.found.mesh),
                "parameters": dict(case.found.parameters), "bytes": dict(case.made.memory),
                "while_running_bytes": dict(case.made.temporary), "peak_bytes": case.made.peak,
                "usable_bytes": case.made.usable, "fits": case.made.fits, "largest_micro_rows": case.made.largest_rows,
                "largest_num_slots": case.made.largest_slots, "step_s": case.made.seconds, "programs": costs(case),
            }
            for case in cases
        ],
    }  # fmt: skip
