"""Evaluate: python -m launch.evaluate --checkpoint=runs/demo --data=FILE --out=FILE

DATA is a file in any known format, tfds:NAME?split=...&dir=..., or world:multihop?split=test&seed=7&n=500.
"""

import json
from pathlib import Path

from absl import flags

from launch.flags import run

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The --workdir of a training.")
DATA = flags.DEFINE_string("data", None, "Questions: a file, tfds:NAME?..., or world:NAME?...")
OUT = flags.DEFINE_string("out", None, "File for the predictions, JSONL.")
FORMAT = flags.DEFINE_string("format", "", "Name of the file's format; empty: recognised from its content.")
flags.mark_flags_as_required(["checkpoint", "data", "out"])


def main(_: list[str]) -> None:
    from rlrag.console import say
    from rlrag.evaluate import evaluate_checkpoint, summarize, write_rows

    rows = evaluate_checkpoint(Path(CHECKPOINT.value), DATA.value, FORMAT.value or None)
    out = Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, rows)
    summary = summarize(rows)
    for metric in ("em", "f1"):
        low, high = summary[f"{metric}_interval"]
        say(f"{metric.upper()} {summary[metric]:.4f}  95 % bootstrap [{low:.4f}, {high:.4f}]  {len(rows)} questions")
    say(json.dumps({name: value for name, value in summary.items() if not isinstance(value, list)}))
    say(f"{out}: predictions")


if __name__ == "__main__":
    run(main)
