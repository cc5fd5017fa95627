"""Predicted against measured memory: python -m tests.memory_check

A training of some GiB plays its first steps on the CPU; what the process grew by at most (resident size) is held
against what the dry run predicted from shapes and compiled programs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rlrag import config
from tests import conftest  # sets the environment, which the child inherits
from tests.experiments import tiny

STEPS = 2
ALLOWED = 0.10


def experiment() -> config.Experiment:
    """The toy world with a model and a cache of more than 2 GiB together."""
    found = tiny()
    found.steps, found.warm_up.steps, found.main.evaluate_every = STEPS, 0, 0
    found.model.num_layers, found.model.embed_dim, found.model.mlp_dim = 8, 768, 2048
    found.model.num_heads, found.model.num_kv_heads, found.model.head_dim = 12, 12, 64
    found.rollout.num_slots, found.rollout.max_episodes, found.rollout.prefill_rows = 32, 32, 16
    found.rollout.num_pages = 2048
    found.main.update.micro_rows, found.main.update.max_micro = 8, 2
    return found


def resident(name: str) -> int:
    """Bytes; VmRSS: now, VmHWM: at most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def child(directory: str) -> None:
    from rlrag import train as loop

    def leave(run, learner, stage, step, *rest, **more):
        if stage:
            print(json.dumps({"before": before, "most": resident("VmHWM")}))
            raise SystemExit(0)

    loop.save = leave  # a checkpoint is copied to be written: that is the disk's business
    loop.score = lambda *_: {}
    before = resident("VmRSS")
    loop.train(experiment(), Path(directory))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
        return
    from rlrag.dry_run import describe, dry_run

    with tempfile.TemporaryDirectory() as folder:
        (plan,) = dry_run(experiment(), Path(folder))
        print(describe([plan]))
        done = subprocess.run(
            [sys.executable, "-m", "tests.memory_check", "--child", f"{folder}/run"],
            cwd=conftest.REPOSITORY, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    grown = measured["most"] - measured["before"]
    error = plan.peak / grown - 1
    print(f"\npredicted {plan.peak / 2**30:.2f} GiB, measured {grown / 2**30:.2f} GiB: {error:+.1%}")
    raise SystemExit(abs(error) > ALLOWED)


if __name__ == "__main__":
    main()
