"""A training in several processes against the same in one: python -m tests.pod

Every kind of run is played on one device and then on other meshes, in one process and in two of two devices each (gloo
on this machine): losses, gradients' norms and rewards of every step must agree to 1e-5, episodes token by token. Then
one of two processes is killed, each in turn: the other must end by itself with a clear error, and the pair, started
again, must end as if it had been left alone. And SIGTERM to one saves on both. `make pod` is this command;
tests/test_processes.py plays the shortest of it.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.processes import environment_of, free_port
from rlrag.config import Experiment
from rlrag.model.architecture import Adapters
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Group
from tests import conftest  # sets the environment, which children inherit
from tests.experiments import tiny
from tests.kill_points import finger_print, rows_of

CLOSE = 1e-5
ALONE_S = 60.0  # a process must end so long after another is gone
COMPARED = ("loss/", "grad_norm", "reward", "trained_tokens", "searches", "em", "micro_batches", "validation/", "kl")


def pay(group: Group) -> list[Paid]:
    """Something that differs between episodes of any policy."""
    return [Paid({"reward": [t.num_sampled % 5 / 4] * len(t.streams)}) for t in group.trajectories]


def on_policy() -> Experiment:
    experiment = tiny()
    experiment.steps, experiment.checkpoint_every, experiment.reward.function = 5, 2, "tests.pod:pay"
    experiment.model.num_heads, experiment.model.embed_dim = 4, 32
    experiment.main.loss.kl = 0.01
    # Adam divides by what may be rounding alone: at this rate that stays below the tolerance.
    experiment.main.update.learning_rate = experiment.warm_up.update.learning_rate = 1e-4
    experiment.main.update.micro_rows = experiment.warm_up.update.micro_rows = 8
    return experiment


def one_step_off() -> Experiment:
    experiment = on_policy()
    experiment.main.one_step_off = True
    return experiment


def dynamic() -> Experiment:
    """Groups are chosen over all processes; and the rows are too few at first."""
    experiment = on_policy()
    experiment.main.dynamic_sampling, experiment.main.update.max_micro = 2, 1
    return experiment


def critic() -> Experiment:
    experiment = on_policy()
    experiment.main.credit.kind, experiment.main.loss.critic = "gae", "separate"
    experiment.main.update.minibatches = 2
    return experiment


def adapters() -> Experiment:
    experiment = on_policy()
    experiment.model.base, experiment.model.adapters = "int8", Adapters(rank=2, alpha=4.0, rows=3)
    experiment.main.loss.reference = "base"
    return experiment


KINDS: dict[str, Callable[[], Experiment]] = {
    f.__name__: f for f in (on_policy, one_step_off, dynamic, critic, adapters)
}


MORE = ("dynamic", "critic")  # rows grow on the way; a second model


class Setting(NamedTuple):
    """processes x devices of each, cut as data x model x replica."""

    processes: int = 1
    devices: int = 1
    model: int = 1
    replica: int = 1

    def __str__(self) -> str:
        data = self.processes * self.devices // (self.model * self.replica)
        return f"{self.processes} x {self.devices} as data {data}, model {self.model}, replica {self.replica}"


ONE_PROCESS = [Setting(1, 2), Setting(1, 4, model=2), Setting(1, 8), Setting(1, 8, model=2, replica=2)]
TWO_PROCESSES = [Setting(2, 2), Setting(2, 2, model=2), Setting(2, 2, replica=2)]


def command(kind: str, directory: Path, setting: Setting) -> list[str]:
    sizes = [f"--config.mesh.{name}={getattr(setting, name)}" for name in ("model", "replica")]
    config = f"{Path(__file__).resolve()}:{kind}"
    return ["launch.train", f"--config={config}", f"--workdir={directory}", *sizes]


def get_config(kind: str) -> Experiment:
    """What launch.train asks for."""
    return KINDS[kind]()


def run(kind: str, directory: Path, setting: Setting, timeout_s: float = 600) -> str:
    """To its end; what it printed."""
    runner = ["launch.processes", f"--count={setting.processes}", f"--devices={setting.devices}", "--"]
    done = subprocess.run(
        [sys.executable, "-m", *runner, *command(kind, directory, setting)],
        cwd=conftest.REPOSITORY, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{kind} on {setting} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def start(kind: str, directory: Path, setting: Setting, **variables: str) -> list[subprocess.Popen]:
    """The processes one by one, as on hosts of their own, each with a log."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    port, children = free_port(), []
    for index in range(setting.processes):
        environment = environment_of(index, setting.processes, setting.devices, port, os.environ | variables)
        with (directory.parent / f"{directory.name}.{index}.log").open("a") as log:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command(kind, directory, setting)], cwd=conftest.REPOSITORY,
                    env=environment, stdout=log, stderr=log,
                )
            )  # fmt: skip
    return children


def run_apart(kind: str, directory: Path, setting: Setting, timeout_s: float = 600) -> list[dict[str, int]]:
    """To the end, as on hosts of their own; how often each process compiled each program."""
    children = start(kind, directory, setting, JAX_LOG_COMPILES="1")
    try:
        statuses = [child.wait(timeout_s) for child in children]
    finally:
        for child in children:
            child.kill()
    logs = [log_of(directory, index) for index in range(setting.processes)]
    if any(statuses):
        raise SystemExit(f"{kind} on {setting} ended with {statuses}:\n{logs[statuses.index(max(statuses, key=abs))]}")
    return [Counter(re.findall(r"Compiling jit\((\w+)\)", log)) for log in logs]


def log_of(directory: Path, index: int) -> str:
    return (directory.parent / f"{directory.name}.{index}.log").read_text()


def apart(directory: Path, other: Path) -> tuple[float, int]:
    """The largest difference of the numbers of two runs, and how many were compared. Raises AssertionError where they
    have other rows, or other predictions."""
    rows, others = rows_of(directory), rows_of(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    worst, number = 0.0, 0
    for row, second in zip(rows, others):
        assert row.keys() == second.keys(), row.keys() ^ second.keys()
        for name in (name for name in row if name.startswith(COMPARED)):
            worst, number = max(worst, abs(row[name] - second[name]) / max(1.0, abs(row[name]))), number + 1
    assert predictions(directory) == predictions(other)
    return worst, number


def predictions(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "predictions_final.jsonl").read_text().splitlines()]


def wait_for_rows(directory: Path, number: int, children: Sequence[subprocess.Popen], timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while len(rows_of(directory)) < number:
        if time.monotonic() > end or any(child.poll() is not None for child in children):
            raise SystemExit(f"{directory} has not come to row {number}: {log_of(directory, 0)[-3000:]}")
        time.sleep(0.02)


def kill_one(kind: str, directory: Path, setting: Setting, victim: int, row: int) -> tuple[float, str]:
    """Kill one process when metrics have that many rows: seconds until all others have ended, and the last line of the
    next one's log."""
    children = start(kind, directory, setting)
    try:
        wait_for_rows(directory, row, children)
        children[victim].kill()
        begin = time.monotonic()
        for child in children:
            child.wait(timeout=2 * ALONE_S)
        seconds = time.monotonic() - begin
    finally:
        for child in children:
            child.kill()
    other = (victim + 1) % setting.processes
    assert children[other].returncode != 0
    end, told = time.monotonic() + 10, ""
    while time.monotonic() < end and not told.startswith("error: "):  # the last words come after the end
        time.sleep(0.1)
        told = log_of(directory, other).strip().splitlines()[-1]
    return seconds, told


def ask_one(kind: str, directory: Path, setting: Setting, asked: int, row: int) -> list[int]:
    """SIGTERM to one process; the exit statuses of all."""
    children = start(kind, directory, setting)
    try:
        wait_for_rows(directory, row, children)
        children[asked].send_signal(signal.SIGTERM)
        return [child.wait(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()


def equal(found: Mapping, wanted: Mapping) -> list[str]:
    """Names of what differs."""
    return [name for name in wanted if found[name] != wanted[name]]


def same_as_one_device(kind: str, base: Path) -> bool:
    run(kind, base / kind, Setting())
    good = True
    for number, setting in enumerate([*ONE_PROCESS, *TWO_PROCESSES] if kind == "on_policy" else TWO_PROCESSES[:2]):
        directory = base / f"{kind}_{number}"
        compiled = run_apart(kind, directory, setting)
        worst, count = apart(directory, base / kind)
        # Every rollout is one program; each of the two stages has an update of its own.
        once = all(each["advance"] == 1 and each["prepare"] == each["apply"] == 2 for each in compiled)
        good &= worst <= CLOSE and (once or kind in MORE)
        told = ", ".join(f"{name} {compiled[0][name]}" for name in ("advance", "prepare", "accumulate", "apply"))
        what = "each program compiled once" if once else f"compiled in two stages: {told}"
        print(
            f"{kind} on {setting}: {count} numbers within {worst:.1e} of one device's, same episodes, {what}",
            flush=True,
        )
    return good


def survives(kind: str, base: Path) -> bool:
    """Kills of each process, and a request to one to end."""
    dice, setting, good = np.random.default_rng(0), Setting(2, 2), True
    whole = base / f"{kind}_whole"
    run(kind, whole, setting)
    wanted = finger_print(whole)

    def again(directory: Path) -> bool:
        run(kind, directory, setting)
        different = equal(finger_print(directory), wanted)
        print(f"  started again: {f'DIFFERENT: {different}' if different else 'bitwise equal'}", flush=True)
        return not different

    for victim in (0, 1):
        directory = base / f"{kind}_killed_{victim}"
        seconds, told = kill_one(kind, directory, setting, victim, int(dice.integers(5, 9)))
        print(f"{kind}: process {victim} killed, the other ended {seconds:.0f} s later: {told}", flush=True)
        good &= again(directory) and seconds <= ALONE_S
    directory = base / f"{kind}_asked"
    statuses = ask_one(kind, directory, setting, 1, 6)
    print(f"{kind}: SIGTERM to process 1, both ended with {statuses}", flush=True)
    moved = directory.with_name(f"{kind}_moved")
    shutil.copytree(directory, moved)
    other = Setting(1, 2, model=2)
    run(kind, moved, other)
    worst, _ = apart(moved, whole)
    print(f"  started again on {other}: within {worst:.1e}, same episodes", flush=True)
    return good and again(directory) and statuses == [0, 0] and worst <= CLOSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    kinds = parser.parse_args().kinds.split(",")
    with tempfile.TemporaryDirectory() as folder:
        good = [same_as_one_device(kind, Path(folder)) for kind in kinds]
        good += [survives(kind, Path(folder)) for kind in ("on_policy", "one_step_off") if kind in kinds]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
