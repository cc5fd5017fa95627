"""Training killed at random moments, continued, and compared bit by bit: python -m tests.kill_points --kills=50

Three kinds of run (on policy with its warm-up; one step off-policy; policy and critic; the latter two from a warm start
that searches) are killed with SIGKILL again and again until they end by themselves; then weights, optimizer states,
metrics rows and predictions must be those of a run that was left alone. `make kill-points` is this command;
tests/test_train.py has a few such moments in one process.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rlrag.config import Experiment
from tests import conftest  # sets the environment, which children inherit
from tests.experiments import taught, tiny

# What depends on the machine's speed, and on when a search came back.
TIMES = ("_s", "seconds", "occupancy", "waste", "rounds", "per_batch", "prefill_tokens", "shared_tokens")


def on_policy() -> Experiment:
    experiment = tiny()
    experiment.steps, experiment.warm_up.steps, experiment.checkpoint_every = 14, 8, 3
    experiment.main.loss.kl, experiment.main.loss.kl_target = 0.01, 0.001  # a reference, an adaptive coefficient
    experiment.main.update.learning_rate = 1e-2
    return experiment


def warm() -> Experiment:
    """A policy that searches, for the others to begin with."""
    experiment = taught()
    experiment.steps = 0
    return experiment


def searching() -> Experiment:
    experiment, like = warm(), on_policy()
    experiment.steps, experiment.checkpoint_every, experiment.main = like.steps, like.checkpoint_every, like.main
    experiment.warm_start = os.environ[WARM_START]
    return experiment


def one_step_off() -> Experiment:
    experiment = searching()
    experiment.main.one_step_off = True
    return experiment


def two_models() -> Experiment:
    experiment = searching()
    experiment.main.credit.kind, experiment.main.loss.critic = "gae", "separate"
    experiment.main.update.epochs, experiment.main.update.minibatches = 2, 2
    return experiment


WARM_START = "RLRAG_TEST_WARM_START"
KINDS: dict[str, Callable[[], Experiment]] = {f.__name__: f for f in (on_policy, one_step_off, two_models)}


def child(kind: str, directory: str) -> None:
    """What is killed."""
    from rlrag.train import train

    train((KINDS | {"warm": warm})[kind](), Path(directory))


def start(kind: str, directory: Path) -> subprocess.Popen:
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.kill_points", "--child", kind, str(directory)]
    log = (directory.parent / f"{directory.name}.log").open("a")
    return subprocess.Popen(command, cwd=conftest.REPOSITORY, stdout=log, stderr=log)


def rows_of(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def without_times(row: dict) -> dict:
    """A logged episode without how long its searches took."""
    for search in row.get("searches", []):
        del search["wait_s"]
    return row


def finger_print(directory: Path) -> dict:
    """Everything that must be equal."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from rlrag.checkpoint import digest

    found = {"result": json.loads((directory / "result.json").read_text())}
    for name in ("seconds", "config"):
        del found["result"][name]
    counted = "rollout/retriever/"  # what a cache still knew
    found["rows"] = [
        {k: v for k, v in row.items() if not k.endswith(TIMES) and not k.startswith(counted)}
        for row in rows_of(directory)
    ]
    for name in ("predictions_final.jsonl", "predictions_warm_start.jsonl"):
        found[name] = (directory / name).read_text() if (directory / name).exists() else ""
    for name in ("alarms.jsonl", "episodes.jsonl"):
        lines = (directory / name).read_text().splitlines() if (directory / name).exists() else []
        found[name] = [without_times(json.loads(line)) for line in lines]
    for folder in ("checkpoints", "best"):
        steps = sorted(int(path.name) for path in (directory / folder).iterdir() if path.name.isdecimal())
        path = (directory / folder / str(steps[-1]) / "state").resolve()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:  # as numpy: the mesh may not be there
            tree = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        found[folder] = [steps[-1], digest(state)]
    return found


def kill_somewhere(process: subprocess.Popen, directory: Path, dice: random.Random, alone_s: float) -> str | None:
    """Kill a session at a random moment; where that was. None where it had ended."""
    before = len(rows_of(directory))
    if dice.random() < 0.25:  # any moment, most of which are before the first step of the session
        deadline, wanted = time.monotonic() + dice.uniform(0, alone_s), 10**9
    else:  # some steps on, and a moment more
        deadline, wanted = time.monotonic() + 600, before + dice.randint(1, 8)
    while time.monotonic() < deadline and process.poll() is None and len(rows_of(directory)) < wanted:
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.25))
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"a session ended with status {process.returncode}: see {directory}.log")
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = rows_of(directory)
    return f"{rows[-1]['stage']} {rows[-1]['step']}" if rows else "before the first step"


def study(kind: str, kills: int, folder: Path, dice: random.Random) -> None:
    """Kill runs of a kind that often, and hold each, once it has ended, against one that was left alone."""
    reference = folder / f"{kind}_alone"
    begin = time.monotonic()
    if start(kind, reference).wait():
        raise SystemExit(f"the run that is left alone failed: see {reference}.log")
    alone_s, wanted, done, run = time.monotonic() - begin, finger_print(reference), 0, 0
    searches = wanted["rows"][-1]["searches"]
    print(f"{kind}: {len(wanted['rows'])} steps in {alone_s:.0f} s, {searches:.2f} searches a question", flush=True)
    while done < kills:
        directory, moments, run = folder / f"{kind}_{run}", [], run + 1
        while True:
            process = start(kind, directory)
            if done + len(moments) >= kills:
                if process.wait():
                    raise SystemExit(f"a session failed: see {directory}.log")
                break
            where = kill_somewhere(process, directory, dice, alone_s)
            if where is None:
                break
            moments.append(where)
        done += len(moments)
        found = finger_print(directory)
        different = [name for name in wanted if found[name] != wanted[name]]
        print(f"{kind} {done}/{kills} kills ({'; '.join(moments)}): {different or 'equal'}", flush=True)
        if different:
            raise SystemExit(f"{directory} differs from {reference} in {', '.join(different)}")
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--kills", type=int, default=51, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    folder = Path(tempfile.mkdtemp(prefix="kill_points_"))
    os.environ[WARM_START] = str(folder / "warm")
    if start("warm", folder / "warm").wait():
        raise SystemExit(f"the warm start failed: see {folder / 'warm'}.log")
    for number, kind in enumerate(KINDS):
        study(kind, -(-arguments.kills // len(KINDS)), folder, random.Random(arguments.seed * 10 + number))
    shutil.rmtree(folder)
    print(f"all equal, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
