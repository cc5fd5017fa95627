"""One command on an accelerator: python -m launch.bench_gpu

Builds, checks and times every kernel implementation, then the rollout, update and step of Qwen2.5 at 0.5, 3 and 7
billion parameters, within a time budget, and writes docs/results/h200.md as it goes: targets beside figures. Every part
is a process of its own: one that fails, hangs or does not fit the memory is told in the table and the next begins. Time
that a part does not need goes to those after it.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

MODELS = ("0.5b", "3b", "7b")
# Toy sizes of everything, with which the tests go through all of this on a CPU.
SMALL = (
    "--quick --rounds=1 --layers=1 --scale=32 --num_slots=4 --max_episodes=8 --episodes=8 --burst=4 --prefill_rows=4",
    "--prefill_chunk=16 --turns=2 --turn_tokens=6 --document_tokens=4 --prompt_tokens=8 --decode_tokens=8",
    "--questions=1 --micro_rows=1",
)

LEAST_S = 5  # what is left must be more than this for another part to begin
FIRST_TRY = 0.8  # of a part's time goes to its first try where it may have a second, without what hung


@dataclass(frozen=True)
class Task:
    """A part to be run. share: of the time that is left, in proportion to those of the parts after it."""

    name: str
    arguments: tuple[str, ...]  # of python -m
    share: float


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_float("budget_s", 470, "Seconds for all of it.", lower_bound=1, flag_values=values)
    flags.DEFINE_list("only", [], "Some of the parts, by name; none: all.", flag_values=values)
    flags.DEFINE_bool("small", False, "Toy sizes, for tests.", flag_values=values)
    flags.DEFINE_string("out", "docs/results/h200.md", "The file that is written.", flag_values=values)


def tasks(small: bool) -> list[Task]:
    """In order: what the most depends on first."""
    kernels = ("kernels.bench", "--quick" if small else "--full", f"--repeats={1 if small else 5}")
    changes = " ".join(SMALL).split() if small else ["--rounds=1"]
    return [
        Task("log_prob", (*kernels, "--only=log_prob"), 140),
        Task("decode_attention", (*kernels, "--only=decode_attention"), 25),
        Task("advantage and uncertainty", (*kernels, "--only=advantage,uncertainty"), 25),
        *(
            Task(
                name,
                ("launch.bench", f"--shape={'qwen2.5-' if name == '0.5b' else ''}{name}", "--phase=rollout,update,step",
                 "--search_ms=200", *changes),
                share,
            )
            for name, share in zip(MODELS, (60, 90, 110))
        ),
    ]  # fmt: skip


def main(f: flags.FlagValues) -> None:
    from launch.flags import Mistake

    chosen = tasks(f.small)
    unknown = set(f.only) - {task.name for task in chosen}
    if unknown:
        raise Mistake(f"--only has {', '.join(unknown)}: there are {', '.join(task.name for task in chosen)}")
    chosen = [task for task in chosen if not f.only or task.name in f.only]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        # The phases of a model share programs: what one has compiled the next finds.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        play_all(f, chosen, begin)
    print(f"written to {f.out}")


def play_all(f: flags.FlagValues, chosen: Sequence[Task], begin: float) -> None:
    from rlrag.speed.findings import Part, page

    parts = [Part(task.name, f"python -m {shlex.join(task.arguments)}") for task in chosen]
    command = f"python -m launch.bench_gpu {shlex.join(sys.argv[1:])}".rstrip()
    for number, (task, part) in enumerate(zip(chosen, parts)):
        left = f.budget_s - (time.monotonic() - begin)
        if left > LEAST_S:
            limit = left * task.share / sum(each.share for each in chosen[number:])
            play(task, part, limit)
        told = f"{part.name}: {part.outcome}, {part.seconds:.0f} s, {len(part.rows)} rows"
        print(told, flush=True)
        Path(f.out).write_text(page(parts, command, time.monotonic() - begin, f.budget_s))


def play(task: Task, part, limit_s: float) -> None:
    """Run a part for at most limit_s: once, or once more without the implementation that it hung on."""
    begin, may_hang = time.monotonic(), not task.arguments[0].startswith("launch")
    part.outcome, part.figures = run(task, (), limit_s * (FIRST_TRY if may_hang else 1))
    hung = part.figures.get("trying", "")
    if hung and part.outcome.startswith("no time"):
        left = limit_s - (time.monotonic() - begin)
        part.outcome, part.figures = run(task, (f"--without={hung}",), left)
        part.outcome += f" ({hung} did not come back, and was left out)"
    part.seconds = time.monotonic() - begin


def run(task: Task, more: Sequence[str], limit_s: float) -> tuple[str, dict]:
    """One try: how it ended, and what it had written by then."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out.json", Path(folder) / "errors"
        arguments = [*task.arguments, *more, f"--out={out}"]
        if task.arguments[0] == "kernels.bench":
            arguments.append(f"--budget_s={0.7 * limit_s:.0f}")  # the last case may take longer
        # Parts run one after another, so each may have nearly all of the memory.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93", **os.environ}
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL, stderr=stderr, env=environment
            )
            try:
                status = process.wait(timeout=limit_s)
                last = (errors.read_text().strip().splitlines() or [f"status {status}"])[-1]
                outcome = "done" if status == 0 else f"failed: {last[:300]}"
            except subprocess.TimeoutExpired:
                outcome = f"no time to end it in {limit_s:.0f} s"
            finally:
                process.kill()  # does nothing where it has ended
                process.wait()
        figures = json.loads(out.read_text()) if out.exists() else {}
    return outcome, figures


if __name__ == "__main__":
    from launch.flags import run as run_program

    run_program(main, define_flags, doc=__doc__)
