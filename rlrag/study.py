"""A study: arms x seeds from cached warm starts, each cell a training of its own process, and what comes of them.

A config file of a study has, beside get_config(variant), get_study() -> Study. What is asked (metric, contrast,
threshold) stands in it and is committed before the first run: an uncommitted file is refused.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlrag import config, workdir
from rlrag.console import say

CONTINUED = "warm_start_continued"  # the arm that every study has: the warm start's learning for equal effort
LEAST_SEEDS = 5  # of the primary contrast
POLL_S = 0.5
SAY_EVERY_S = 20.0
NOT_OF_A_WARM_START = (
    "name",
    "seed",
    "checkpoint_every",
    "watch",
    "log_episodes",
    "best_metric",
)  # fields that change nothing of what it learns


@dataclass(frozen=True)
class Arm:
    """A variant of the study's config file, with further fields changed: {"main.update.learning_rate": 1e-4}."""

    variant: str
    seeds: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Primary:
    """What the study asks: is arm `better` above arm `baseline` in the metric, by more than the threshold?"""

    metric: str
    better: str
    baseline: str
    threshold: float = 0.0


@dataclass(frozen=True)
class Study:
    """arms: by name. warm_start: the variant all arms begin from, one for each seed. contrasts: further pairs of arms,
    on the primary metric. metrics: of a result's scores, shown and recorded."""

    name: str
    title: str
    arms: Mapping[str, Arm]
    primary: Primary
    warm_start: str = "warm_start"
    contrasts: tuple[tuple[str, str], ...] = ()
    metrics: tuple[str, ...] = ("em", "f1", "searches")

    def check(self) -> None:
        """Raise ValueError for a study that could not say what it asks."""
        if CONTINUED not in self.arms:
            raise ValueError(f"the study {self.name} has no arm {CONTINUED!r}: every gain must be held against it")
        for a, b in self.all_contrasts:
            for arm in (a, b):
                if arm not in self.arms:
                    raise ValueError(f"a contrast names {arm!r}; the arms are: {', '.join(self.arms)}")
        for arm in (self.primary.better, self.primary.baseline):
            if len(self.arms[arm].seeds) < LEAST_SEEDS:
                count = len(self.arms[arm].seeds)
                raise ValueError(f"arm {arm!r} of the primary contrast has {count} seeds: give at least {LEAST_SEEDS}")
        if self.primary.metric not in self.metrics:
            raise ValueError(f"the primary metric {self.primary.metric!r} is none of {', '.join(self.metrics)}")

    @property
    def all_contrasts(self) -> tuple[tuple[str, str], ...]:
        return ((self.primary.better, self.primary.baseline), *self.contrasts)


class Cell(NamedTuple):
    """One training. after: the warm start that must be finished before."""

    name: str
    directory: Path
    command: tuple[str, ...]
    after: "Cell | None" = None

    @property
    def result(self) -> dict[str, Any] | None:
        return workdir.read(self.directory / "result.json")


# -- the cells of a study ---------------------------------------------------------------------------------------------


def field_flags(fields: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


def warm_start_cell(study: Study, file: str, get_config: Callable[[str], config.Experiment], runs: Path, seed: int) -> Cell:  # fmt: skip # noqa: E501
    """The warm start of a seed, under a name that its whole configuration decides, so that studies share it."""
    experiment = config.to_dict(get_config(study.warm_start))
    what = {name: value for name, value in experiment.items() if name not in NOT_OF_A_WARM_START}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    directory = runs / "warm_starts" / f"{digest}-{seed}"
    return Cell(f"{study.warm_start}:{seed}", directory, train_command(file, study.warm_start, seed, directory))


def train_command(file: str, variant: str, seed: int, directory: Path, *more: str) -> tuple[str, ...]:
    command = (sys.executable, "-m", "launch.train", f"--config={file}:{variant}", f"--config.seed={seed}")
    return (*command, f"--workdir={directory}", *more)


def cells_of(
    study: Study, file: str, get_config: Callable[[str], config.Experiment], runs: Path
) -> dict[tuple[str, int], Cell]:
    """Every cell by arm and seed. runs: the directory that holds warm starts and studies."""
    starts: dict[int, Cell] = {}
    cells = {}
    for name, arm in study.arms.items():
        for seed in arm.seeds:
            start = starts.setdefault(seed, warm_start_cell(study, file, get_config, runs, seed))
            directory = runs / "studies" / study.name / f"{name}-{seed}"
            more = [f"--config.warm_start={start.directory}", *field_flags(arm.fields)]
            command = train_command(file, arm.variant, seed, directory, *more)
            cells[name, seed] = Cell(f"{name}:{seed}", directory, command, start)
    return cells


# -- running them -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[bool]:
    """Whether this process holds the cell. The lock ends with the process that holds it, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass
class Running:
    cell: Cell
    process: subprocess.Popen
    held: contextlib.ExitStack


class Runner:
    """Plays cells in several processes. Another invocation may play others of the same study at the same time."""

    def __init__(self, cells: Sequence[Cell], processes: int):
        starts = {cell.after.directory: cell.after for cell in cells if cell.after}
        self.todo: list[Cell] = [*starts.values(), *cells]
        self.processes, self.total = processes, len(self.todo)
        self.running: list[Running] = []
        self.failed: list[Cell] = []
        self.done = 0
        self._said = time.monotonic()

    def run(self) -> list[Cell]:
        """Plays every cell that is not finished; those that failed."""
        try:
            while self.todo or self.running:
                self._collect()
                self._start()
                self._tell()
                if self.todo or self.running:
                    time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise
        return self.failed

    def _start(self) -> None:
        for cell in list(self.todo):
            if cell.result is not None:
                self.todo.remove(cell)
                self.done += 1
            elif cell.after is not None and any(bad.directory == cell.after.directory for bad in self.failed):
                self.todo.remove(cell)
                self.failed.append(cell)
            elif len(self.running) < self.processes and (cell.after is None or cell.after.result is not None):
                self._launch(cell)

    def _launch(self, cell: Cell) -> None:
        held = contextlib.ExitStack()
        if not held.enter_context(lock(cell.directory)):
            held.close()  # another invocation plays it: look again
            return
        self.todo.remove(cell)
        log = held.enter_context((cell.directory / "log.txt").open("a"))
        # Its own session, so that Ctrl-C reaches this process alone, which then ends its children in order.
        process = subprocess.Popen(cell.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.running.append(Running(cell, process, held))

    def _collect(self) -> None:
        for one in list(self.running):
            status = one.process.poll()
            if status is None:
                continue
            self.running.remove(one)
            one.held.close()
            if one.cell.result is None:
                say(f"FAILED  {one.cell.name} (exit status {status}): {one.cell.directory / 'log.txt'}")
                self.failed.append(one.cell)
            else:
                self.done += 1
                say(f"{self.done}/{self.total}  {one.cell.name}: {summary_line(one.cell.result)}")

    def _tell(self) -> None:
        if time.monotonic() - self._said >= SAY_EVERY_S and self.running:
            self._said = time.monotonic()
            now = ", ".join(f"{one.cell.name} {last_step(one.cell.directory)}" for one in self.running)
            say(f"{self.done}/{self.total} done; running: {now}")

    def _stop(self) -> None:
        """SIGTERM: every training saves and ends; the same command goes on."""
        for one in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGTERM)
        for one in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(timeout=60)
            if one.process.poll() is None:
                one.process.kill()
            one.held.close()


def summary_line(result: Mapping[str, Any]) -> str:
    final = result["final"]
    return f"EM {final['em']:.3f}, F1 {final['f1']:.3f}, {result['seconds']:.0f} s"


def last_step(directory: Path) -> str:
    rows = read_rows(directory / "metrics.jsonl")
    return f"{rows[-1]['stage']} {rows[-1]['step']}" if rows else "starting"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that another process may be writing to."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


# -- refusing what was not committed ----------------------------------------------------------------------------------


def committed(file: Path) -> str:
    """The commit whose version of the file this is. ValueError where it is none."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=file.parent or ".", capture_output=True, text=True, timeout=60)

    remedy = "commit it first, so that what is asked is fixed before it is answered, or give --allow_dirty"
    try:
        head, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", file.name)
    except FileNotFoundError:
        raise ValueError(f"git is not installed, so {file} cannot be known as committed: {remedy}") from None
    if head.returncode or status.returncode:
        raise ValueError(f"{file} is in no git repository: {remedy}")
    if status.stdout.strip() or git("ls-files", "--error-unmatch", "--", file.name).returncode:
        raise ValueError(f"{file} differs from its last commit: {remedy}")
    return head.stdout.strip()
