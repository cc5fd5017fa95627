"""Planning past this machine: what a training takes of a mesh of devices that are not here, and how long a step is.

Memory is a survey's bytes (rlrag/survey.py). Time is a roofline (Williams et al. 2009, doi 10.1145/1498765.1498785): a
program takes as long as the slowest of its products, its memory and its links, each at an assumed share of what the
vendor says is possible. It is a lower bound for code that is not tuned: what is done element by element, the start of
programs, the host and searches are not in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from rlrag.config import Experiment
from rlrag.devices import CPU, Device
from rlrag.dry_run import ROLLOUT, USABLE, Setting, open_settings
from rlrag.hlo import Cost, Told
from rlrag.model.architecture import AUTO
from rlrag.survey import Survey

PHASES = ("rollout", "update")


@dataclass(frozen=True)
class Assumed:
    """Shares of the vendors' figures; none is measured."""

    memory: float = USABLE  # of a device's memory that arrays may fill
    products: float = 0.5  # of the peak, in matrix products
    bandwidth: float = 0.8  # of the memory
    links: float = 0.8


@dataclass(frozen=True)
class Load:
    """What a step plays. Prompts that a group shares are counted for each of its members."""

    episodes: int
    sampled: int  # tokens an episode
    observed: int  # prompt and passages

    def check(self, longest: int) -> None:
        if self.sampled < 1 or self.observed < 1 or self.sampled + self.observed > longest:
            raise ValueError(
                f"sampled_tokens is {self.sampled} and observed_tokens {self.observed}: give at least 1 each, and "
                f"together at most the agent's max_tokens, {longest}"
            )


@dataclass(frozen=True)
class Timing:
    """One program of a step, a device."""

    runs: int  # a step
    cost: Cost  # of one run
    compute_s: float
    memory_s: float
    links_s: float

    @property
    def bound(self) -> str:
        each = {"products": self.compute_s, "memory": self.memory_s, "links": self.links_s}
        return max(each, key=lambda name: each[name])

    @property
    def seconds(self) -> float:
        """Of all runs; the three overlap fully within a program, and programs do not overlap."""
        return self.runs * max(self.compute_s, self.memory_s, self.links_s)


@dataclass(frozen=True)
class Forecast:
    """Bytes a device and seconds a step."""

    memory: Mapping[str, int]  # parts
    temporary: Mapping[str, int]  # by program, with what stands beside it
    peak: int
    usable: int
    largest_rows: int  # update.micro_rows that fits, all else as configured; 0: none
    largest_slots: int  # rollout.num_slots
    timings: Mapping[str, Timing]  # empty where the device's speed is not known
    step_tokens: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.timings.values())


@contextmanager
def open_setting(experiment: Experiment, directory: Path) -> Iterator[Setting]:
    """The last stage that has steps, on as many of this process's devices as the mesh has."""
    if experiment.model.remat == AUTO:
        raise ValueError(
            f"model.remat is {AUTO!r}, which asks the devices of a training: plan with each of --config.model.remat= "
            "(nothing), elementwise and all"
        )
    # Nothing is searched: no server is started or asked.
    experiment = replace(experiment, retriever=replace(experiment.retriever, spawn=False, url=""))
    many = math.prod(vars(experiment.mesh).values())
    with open_settings(experiment, directory, jax.devices()[:many]) as settings:
        if not settings:
            raise ValueError(f"steps is {experiment.steps}: give --config.steps=1 or more, so that there is a stage")
        yield settings[-1]


def forecast(found: Survey, setting: Setting, name: str, device: Device, load: Load, assumed: Assumed) -> Forecast:
    rows, slots = found.rows, found.slots
    # Of the host's memory all can be used: the process itself is among the parts.
    usable = int(device.memory_bytes.value * (1.0 if name == CPU else assumed.memory))
    return Forecast(
        memory=parts(found, rows, slots),
        temporary=found.temporary(rows, slots),
        peak=found.peak(rows, slots),
        usable=usable,
        largest_rows=largest(lambda n: found.peak(n, slots) <= usable, found.shards),
        largest_slots=largest(lambda n: found.peak(rows, n) <= usable, found.shards),
        timings=timings(found, setting, device, load, assumed),
        step_tokens=load.episodes * (load.sampled + load.observed),
    )


def parts(found: Survey, rows: int, slots: int) -> dict[str, int]:
    """What stays, what stands beside the programs of a phase, and what the hungriest of each phase needs for itself.
    Rollout and update take turns: only one phase's parts add up to the peak."""
    account = found.account(rows, slots)
    needed = {name: line.at(rows, slots) for name, line in found.needed.items()}
    phases = {phase: [name for name in needed if (name in ROLLOUT) == (phase == PHASES[0])] for phase in PHASES}
    activations = {f"activations, {phase}": max(map(needed.__getitem__, names)) for phase, names in phases.items()}
    return {**account.stays, **account.beside, **activations}


def largest(fits: Callable[[int], bool], unit: int) -> int:
    """The largest multiple of unit that fits; 0: not even one unit does."""
    if not fits(unit):
        return 0
    low, high = 1, 2
    while fits(high * unit):
        low, high = high, 2 * high
        if high * unit > 2**40:
            raise ValueError("everything fits: bytes do not grow")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


# -- time -------------------------------------------------------------------------------------------------------------


def timings(found: Survey, setting: Setting, device: Device, load: Load, assumed: Assumed) -> dict[str, Timing]:
    """Every program of a step, in the order in which they run."""
    speeds = device.flops, device.bandwidth, device.links, device.network
    if any(figure is None for figure in speeds):
        return {}
    timed = {}
    for name, runs in runs_of(found, setting, load).items():
        cost = found.costs.get(name)
        if cost is not None and runs:
            timed[name] = timing(runs, cost, device, found.mesh, assumed)
    return timed


def runs_of(found: Survey, setting: Setting, load: Load) -> dict[str, int]:
    """How often each program runs in a step. Every slot is busy until its share of the episodes is played."""
    spec, update = setting.spec, setting.stage.settings.update
    waves = -(-load.episodes // spec.num_slots)
    steps = waves * load.sampled
    micros = -(-load.episodes * (load.sampled + load.observed) // (update.micro_rows * update.row_tokens))
    acting = setting.acting
    return {
        "pack": acting,
        "prefill": -(-load.episodes * load.observed // (spec.prefill_rows * spec.prefill_chunk)),
        "decode": steps,
        "prepare": 1,
        "score": found.passes * micros,
        "accumulate": micros * update.epochs,
        "apply": min(update.minibatches, micros) * update.epochs,
    }


def timing(runs: int, cost: Cost, device: Device, mesh: Mapping[str, int], assumed: Assumed) -> Timing:
    assert device.flops and device.bandwidth and device.links and device.network

    def seconds(told: Told, sent: float) -> float:
        speed = device.network if leaves(told[1], mesh, device.joined) else device.links
        assert speed is not None
        return sent / (speed.value * assumed.links)

    return Timing(
        runs=runs,
        cost=cost,
        compute_s=cost.flops / (device.flops.value * assumed.products),
        memory_s=cost.traffic / (device.bandwidth.value * assumed.bandwidth),
        links_s=sum(seconds(told, sent) for told, sent in cost.sent.items()),
    )


def leaves(axes: tuple[str, ...], mesh: Mapping[str, int], joined: int) -> bool:
    """Whether devices that differ along these axes lie further apart than fast links reach. Devices are numbered in the
    mesh's order, its last axis first filled, and every `joined` of them have fast links."""
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh)
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))[first]
    return bool(np.max(numbers) >= joined)
