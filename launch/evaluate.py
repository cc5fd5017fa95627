"""Evaluate: python -m launch.evaluate --checkpoint=runs/demo --data=FILE --out=FILE

DATA is a file in any known format, tfds:NAME?split=...&dir=..., or world:multihop?split=test&seed=7&n=500.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch.flags import run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "The --workdir of a training.", flag_values=values)
    flags.DEFINE_string("data", None, "Questions: a file, tfds:NAME?..., or world:NAME?...", flag_values=values)
    flags.DEFINE_string("out", None, "File for the predictions, JSONL.", flag_values=values)
    flags.DEFINE_string(
        "format", "", "Name of the file's format; empty: recognised from its content.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    workdir, out = Path(values.checkpoint), Path(values.out)
    if not workdir.is_dir():
        raise ValueError(
            f"--checkpoint={workdir} is no directory, seen from {Path.cwd()}: name the --workdir of a training"
        )
    if out.is_dir():
        raise ValueError(f"--out={out} is a directory: name a file, as in --out={out / 'predictions.jsonl'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.touch()  # told now and not when the work is done
    try:
        from rlrag.evaluate import evaluate_checkpoint, summarize, write_rows

        rows = evaluate_checkpoint(workdir, values.data, values.format or None)
        write_rows(part, rows)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    report(summarize(rows), out)


def report(summary: dict[str, Any], out: Path) -> None:
    from rlrag.console import say

    for metric in ("em", "f1"):
        low, high = summary[f"{metric}_interval"]
        say(f"{metric.upper()} {summary[metric]:.4f}  95 % bootstrap [{low:.4f}, {high:.4f}]")
    rounded = {name: round(value, 4) for name, value in summary.items() if not isinstance(value, list)}
    say(json.dumps(rounded))
    say(f"{out}: predictions")


if __name__ == "__main__":
    run(
        main,
        define_flags,
        required={"checkpoint": "runs/demo", "data": "FILE", "out": "predictions.jsonl"},
        doc=__doc__,
    )
