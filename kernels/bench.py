"""Time, memory and correctness of every implementation on this device: ``python -m kernels.bench [--quick | --full]``.

On CPU the default is the demo's shapes and those of real models scaled down; on an accelerator it is the real shapes.
Implementations of one shape are timed in turn within one loop, and beside them a bare matrix product and the memory,
which are the ceilings: ``share`` is of the one that bounds the operation. ``check`` is the largest difference to the
reference; ``x time`` and ``x temp`` are ratios to the naive path where there is one, else to the reference.
"""

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kernels import ceilings, dispatch, tuning
from kernels.bench_cases import OPERATIONS, SIZES, cases
from kernels.ceilings import Ceilings
from kernels.measurement import Case, Row, measure

UNITS = {"matrix": (1e9, "GFLOP/s"), "bandwidth": (1e9, "GB/s")}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m kernels.bench", description="Times every kernel implementation.")
    made.add_argument("--shapes", choices=SIZES, help="which shapes; scaled on CPU and full elsewhere, unless said")
    made.add_argument("--quick", dest="shapes", action="store_const", const="quick", help="small shapes, a few seconds")
    made.add_argument("--full", dest="shapes", action="store_const", const="full", help="real shapes")
    made.add_argument("--only", type=names, default=OPERATIONS, help=f"some of {','.join(OPERATIONS)}")
    made.add_argument("--without", default=(), type=lambda text: text.split(","), help="implementations left out")
    made.add_argument("--repeats", type=int, default=5, help="timed rounds of each implementation")
    made.add_argument(
        "--budget_s", type=float, default=math.inf, help="cases begun later than this are left out, and named"
    )
    made.add_argument("--out", type=Path, help="file for the figures as JSON, written as they come")
    made.add_argument("--tune", action="store_true", help="time the tiles of accelerator kernels; writes tiles.json")
    return made


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in OPERATIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(OPERATIONS)}")
    return chosen


def described(arguments: Sequence[str], size: str, repeats: int) -> dict[str, Any]:
    """Device, JAX version, date and command: no number is printed without them."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} ({device.platform}), {jax.device_count()} device(s), {os.cpu_count()} cores",
        "versions": f"jax {jax.__version__}, python {sys.version.split()[0]}",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": f"python -m kernels.bench {' '.join(arguments)}".rstrip(),
        "shapes": f"{size}, median and min of {repeats} rounds, rates from the median and the least possible work",
    }


TITLES = (
    f"{'operation':<17} {'implementation':<22} {'median ms':>10} {'min ms':>10} {'rate':>16} {'share':>6} "
    f"{'x time':>7} {'x temp':>7} {'temp MiB':>10} {'peak MiB':>9} {'check':>8}  shape"
)


def table_line(row: Row) -> str:
    """One line of the table."""
    scale, unit = UNITS[row.bound]
    rate = f"{row.rate / scale:,.1f} {unit}"
    numbers = (
        f"{row.median_s * 1e3:>10.3f} {row.min_s * 1e3:>10.3f} {rate:>16} {row.share:>6.2f} {row.time_ratio:>7.3f} "
        f"{row.memory_ratio:>7.3f} {row.temporary_bytes / 2**20:>10.2f} {row.peak_bytes / 2**20:>9.0f} "
        f"{row.check:>8.0e}"
    )
    # What is not known (nan) is a dash.
    numbers = numbers.replace("nan GFLOP/s", "        nan").replace("nan", "  -")
    failed = f"  FAILED: {row.error}" if row.error else ""
    return f"{row.operation:<17} {row.implementation:<22} {numbers}  {row.shape}{failed}"


def as_json(row: Row) -> dict[str, Any]:
    """What is not known is null."""
    values = row._asdict() | {"share": row.share}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def ceilings_of(case: Case, general: Ceilings, dtype: str, size: int) -> Ceilings:
    """Of a square product in the case's dtype: a product of its own shape that writes all it computes is bound by that
    where D is small."""
    if case.dtype == dtype or not case.flops:
        return general.with_product(general.product)
    return general.with_product(ceilings.matrix_product(size, size, size, case.dtype))


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and print the table, a line as soon as it is measured."""
    options = parser().parse_args(arguments)
    platform = dispatch.current_platform()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    size = options.shapes or ("scaled" if platform == "cpu" else "full")
    sizes = ceilings.QUICK if size == "quick" or options.tune else ceilings.SIZES[platform]
    general = ceilings.open_ceilings(dtype, sizes)
    if options.tune:
        print(tuning.tune(options.only, size, options.repeats, general))
        return
    begin = time.monotonic()
    found: dict[str, Any] = described(arguments, size, options.repeats) | {"rows": [], "left_out": []}
    print("\n".join(f"{name:<8} {found[name]}" for name in ("device", "versions", "date", "command", "shapes")))
    print(f"\n{TITLES}")

    def save(**more: Any) -> None:
        if options.out:
            options.out.write_text(json.dumps(found | more, indent=1) + "\n")

    for case in cases(size, platform, options.only):
        functions = {name: each for name, each in case.functions.items() if name not in options.without}
        if time.monotonic() - begin > options.budget_s:
            found["left_out"].append(f"{case.operation} at {case.shape}")
        else:
            own, deadline = ceilings_of(case, general, dtype, sizes.product), begin + options.budget_s
            case = case._replace(functions=functions)
            for row in measure(case, options.repeats, own, deadline, lambda name: save(trying=name)):
                print(table_line(row), flush=True)
                found["rows"].append(as_json(row))
        save()
    for name in found["left_out"]:
        print(f"left out, no time: {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
