"""A dry run: everything a training needs is opened, checked and compiled, nothing is allocated; and what it will take.

Memory is predicted a device, from the shapes of what stays and what the compiler says of what each program needs for
itself while it runs.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlrag import config, processes, workdir
from rlrag.console import say
from rlrag.data.task import Task, open_task, served
from rlrag.devices import CPU, find_device
from rlrag.learner import Programs
from rlrag.mesh import DATA, MODEL, local_mesh, rows_sharding
from rlrag.model.architecture import AUTO, Architecture
from rlrag.model.decoding import abstract_weights, pack, parts
from rlrag.model.parameters import abstract, num_parameters, shardings
from rlrag.objectives.update import TrainState, Update
from rlrag.packing import empty_batch
from rlrag.recipes.recipe import Stage
from rlrag.retrieval.service import open_remote
from rlrag.rollout.advance import Spec, build_advance, cache_partitions, empty_cache
from rlrag.rollout.decoder import check, empty_inbox
from rlrag.setup import acting_models, build_architecture, build_spec, build_stages, check_sizes, open_mesh, resolved

# Where memory is the host's: what a training adds to its process beside arrays, most of it the compiler's (measured on
# x86-64 with toy models, tests/memory_check.py).
PROCESS_BYTES = 320 * 2**20
USABLE = 0.9  # of a device's memory: not all that is free lies together
BY_COST = ("", "elementwise", "all")  # of model.remat, the fastest first
ROLLOUT = ("pack", "advance", "prefill", "decode")  # programs of sampling; advance is prefill and decode


@dataclass(frozen=True)
class Setting:
    """What a plan is of: one stage of an experiment on a mesh, its task open."""

    experiment: config.Experiment
    task: Task
    stages: tuple[Stage, ...]
    stage: Stage
    a: Architecture
    spec: Spec
    mesh: Mesh

    @property
    def programs(self) -> Programs:
        return programs_of(self)

    @property
    def acting(self) -> int:
        """Models that speak: each has a cache, and weights in the layout of decoding."""
        return len(acting_models(self.stages))

    def resized(self, *, layers: int = 0, rows: int = 0, slots: int = 0) -> "Setting":
        """The same with another number of layers, rows a micro-batch, slots (pages in proportion); 0: as it is."""
        update = self.stage.settings.update
        update = replace(update, micro_rows=rows or update.micro_rows)
        slots = slots or self.spec.num_slots
        pages = self.spec.num_pages * slots // self.spec.num_slots
        return replace(
            self,
            stage=self.stage._replace(settings=replace(self.stage.settings, update=update)),
            a=replace(self.a, num_layers=layers or self.a.num_layers),
            spec=replace(self.spec, num_slots=slots, num_pages=pages),
        )


@dataclass(frozen=True)
class Account:
    """Bytes a device, from shapes and shardings alone. stays: from step to step; beside: what stands beside programs
    while they run."""

    stays: Mapping[str, int]
    beside: Mapping[str, int]

    def beside_program(self, name: str) -> int:
        kinds = ("decode weights",) if name in ROLLOUT else ("batch",) if name == "prepare" else ("batch", "gradients")
        return sum(self.beside[kind] for kind in kinds)


@dataclass(frozen=True)
class Plan:
    """What a stage will take. needed: bytes a device that each program needs for itself while it runs; compile_s:
    seconds, in parallel."""

    stage: str
    parameters: Mapping[str, int]  # by model
    account: Account
    needed: Mapping[str, int]
    compile_s: Mapping[str, float]
    step_tokens: int  # at most: what the episodes of a step can hold
    row_tokens: int  # columns of a batch's rows

    @property
    def parts(self) -> Mapping[str, int]:
        return self.account.stays

    @property
    def temporary(self) -> Mapping[str, int]:
        """Bytes a device while each program runs: its own, and its gradients, batch or decode weights."""
        return {name: own + self.account.beside_program(name) for name, own in self.needed.items()}

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + max(self.temporary.values())


def dry_run(experiment: config.Experiment, directory: Path) -> list[Plan]:
    """The plan of every stage that has steps. Raises ValueError, as training does, for what cannot work."""
    with open_settings(experiment, directory) as settings:
        return [plan(setting) for setting in settings]


@contextmanager
def open_settings(
    experiment: config.Experiment, directory: Path, devices: Sequence[Any] | None = None
) -> Iterator[list[Setting]]:
    """Every stage that has steps, checked as training checks it, on the experiment's mesh of these devices (None: all
    that there are)."""
    config.check(experiment)
    experiment = resolved(experiment, directory)
    if experiment.warm_start:
        workdir.finished(experiment)
    mesh = open_mesh(experiment.mesh, devices)
    with jax.set_mesh(mesh), open_remote(experiment.retriever, served(experiment), directory) as remote:
        task = open_task(experiment, directory, remote)
        stages = build_stages(experiment, task)
        check_sizes(task, stages, mesh)
        spec = build_spec(experiment, task)
        check(spec, local_mesh(mesh).shape[DATA])
        a = build_architecture(experiment, task)
        yield [Setting(experiment, task, stages, stage, a, spec, mesh) for stage in stages if stage.steps]


# -- what there is room for -------------------------------------------------------------------------------------------


def settle(setting: Setting, seed: int = 0) -> tuple[Setting, Programs]:
    """The setting and the programs of its stage, where model.remat is auto with what is settled in its place.

    That is the first of BY_COST whose update fits: what stays from step to step, gradients, batch and what `accumulate`
    needs for itself, as compiled, within USABLE of a device's memory. The programs hold what has been compiled: their
    first call compiles nothing again. What is settled follows from shapes, compiler and kind of device, not from what
    else a device happens to hold: a training that goes on goes on as it began.
    """
    if setting.a.remat != AUTO:
        return setting, programs_of(setting, seed)
    usable, tried = int(USABLE * min(processes.gather("memory", memory_bytes()))), []
    for remat in BY_COST:
        trial = replace(setting, a=replace(setting.a, remat=remat))
        programs, found = programs_of(trial, seed), account(trial)
        lowered = lower_update(programs, trial.stage, trial.mesh)
        compiled, _ = compile_all({name: each for name, each in lowered.items() if name.startswith("accumulate")})
        needed = max(program.memory_analysis().temp_size_in_bytes for program in compiled.values())
        peak = sum(found.stays.values()) + needed + found.beside_program("accumulate")
        tried.append(f"{remat or 'nothing'} {mebibytes(peak).strip()}")
        if peak <= usable or remat == BY_COST[-1]:
            break
    taken = f"{trial.stage.name}: model.remat is {remat!r}, {mebibytes(usable).strip()} a device may be filled"
    short = "" if peak <= usable else f"; make {trial.stage.name}.update.micro_rows smaller"
    say(f"{taken}; recomputing {', '.join(tried)}{short}")
    return trial, programs


def programs_of(setting: Setting, seed: int = 0) -> Programs:
    return Programs(setting.stage, setting.a, setting.mesh, setting.spec.num_kept, seed)


def memory_bytes() -> int:
    """Of a device of this process; where memory is the host's, its share of that."""
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min(int(limit or find_device(CPU).memory_bytes.value // len(devices)) for limit in limits)


def plan(setting: Setting) -> Plan:
    """Compiles every program as it is."""
    setting, _ = settle(setting)
    programs, stage = setting.programs, setting.stage
    compiled, seconds = compile_all(lower(setting))
    return Plan(
        stage=stage.name,
        parameters={name: num_parameters(own) for name, own in programs.architectures.items()},
        account=account(setting),
        needed={name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()},
        compile_s=seconds,
        step_tokens=stage.settings.questions * stage.settings.group_size * setting.task.workflow.max_tokens,
        row_tokens=math.prod(abstract_batch(programs, stage, setting.mesh).tokens.shape),
    )


def account(setting: Setting) -> Account:
    programs, mesh, acting = setting.programs, setting.mesh, setting.acting
    params = {name: abstract(own, mesh) for name, own in programs.architectures.items()}
    states = {name: abstract_state(update, params[name]) for name, update in programs.updates.items()}
    own = {name: update.own(params[name]) for name, update in programs.updates.items()}
    batch = abstract_batch(programs, setting.stage, mesh)
    return Account(
        stays={
            "weights": sum(map(size, params.values())),
            "references": sum(size(own[name]) for name in programs.refers),
            "optimizer": sum(size(state.opt_state) for state in states.values()),
            "cache": size(abstract_cache(setting.a, setting.spec, local_mesh(mesh))) * acting,
            # Counted only where memory is the host's.
            "process": PROCESS_BYTES if jax.default_backend() == "cpu" else 0,
        },
        beside={
            "decode weights": size(abstract_weights(setting.a, local_mesh(mesh))) * acting,
            "batch": size(batch) * len(set(programs.reads.values())),
            "gradients": max((size(gradients_of(update)) for update in programs.updates.values()), default=0),
        },
    )


# -- abstract values: shapes with shardings ---------------------------------------------------------------------------


def size(tree: Any) -> int:
    """Bytes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def placed(tree: Any, where: Any) -> Any:
    """Shapes and types of a tree, laid out: where is one sharding, or a tree of them."""
    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)


def abstract_state(update: Update, params: Any) -> TrainState:
    where = update.where()
    opt_state = placed(jax.eval_shape(update.optimizer.init, update.own(params)), where.opt_state)
    return TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=where.step))  # type: ignore[arg-type]


def gradients_of(update: Update) -> Any:
    own = update.own(shardings(update.architecture, update.mesh))
    return placed(jax.eval_shape(update.gradients), own)


def abstract_batch(programs: Programs, stage: Stage, mesh: Mesh) -> Any:
    return placed(empty_batch(programs.shape(stage.settings.update.max_micro)), rows_sharding(mesh))


def abstract_cache(a: Architecture, spec: Spec, mesh: Mesh) -> Any:
    """mesh: of one process."""
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_partitions(a, spec, mesh))
    return placed(jax.eval_shape(lambda: empty_cache(a, spec, mesh)), where)


# -- lowering and compiling -------------------------------------------------------------------------------------------


def lower(setting: Setting) -> dict[str, Any]:
    """Every program of a step."""
    return {**lower_rollout(setting), **lower_update(setting.programs, setting.stage, setting.mesh)}


def lower_rollout(setting: Setting) -> dict[str, Any]:
    a, spec, mesh, here = setting.a, setting.spec, setting.mesh, local_mesh(setting.mesh)
    cut, where = parts(a, mesh.shape[MODEL]), jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(a, mesh))
    weights, cache = abstract_weights(a, here), abstract_cache(a, spec, here)
    return {
        "pack": jax.jit(lambda params: pack(params, a, cut), out_shardings=where).lower(abstract(a, mesh)),
        "advance": lower_advance(setting.experiment, setting.task, a, spec, mesh, weights, cache),
    }


def lower_advance(experiment, task: Task, a: Architecture, spec: Spec, mesh: Mesh, weights, cache):
    states = experiment.rollout.max_stop_states
    stops, accepting = np.zeros((states, a.vocab_size), np.int16), np.zeros(states, bool)
    mesh = local_mesh(mesh)
    advance = build_advance(spec, a, task.tokenizer.end_id, mesh)
    inbox = empty_inbox(spec, mesh.shape[DATA], len(a.adapters.listed))
    with jax.set_mesh(mesh):
        return advance.lower(weights, cache, inbox, stops, accepting, jax.random.key(0))


def lower_update(programs: Programs, stage: Stage, mesh: Mesh) -> dict[str, Any]:
    """prepare, and accumulate and apply of each model that learns."""
    batch = abstract_batch(programs, stage, mesh)
    batches = dict.fromkeys(programs.reads.values(), batch)
    params = {name: abstract(programs.architectures[name], mesh) for name in programs.updates}
    references = {
        name: update.own(params[name]) if name in programs.refers else None for name, update in programs.updates.items()
    }
    coefficients = {name: np.float32(c.value) for name, c in stage.recipe.coefficients.items()}
    num_micro = dict.fromkeys(batches, np.int32(1))
    lowered = {"prepare": programs.prepare.lower(params, references, batches, num_micro, coefficients)}
    prepared = lowered["prepare"].out_info
    replicated = NamedSharding(mesh, PartitionSpec())
    chosen = np.zeros(batch.tokens.shape[0], np.float32)
    for name, update in programs.updates.items():
        counts = placed(prepared.counts[name], replicated)
        sums = placed(update.no_metrics(batch), replicated)
        suffix = "" if len(programs.updates) == 1 else f" {name}"
        state, gradients = abstract_state(update, params[name]), gradients_of(update)
        lowered[f"accumulate{suffix}"] = update.accumulate.lower(
            params[name], gradients, sums, batch, counts, coefficients, chosen, np.int32(0), state.step
        )
        lowered[f"apply{suffix}"] = update.apply.lower(state, gradients)
    return lowered


def compile_all(
    lowered: Mapping[str, Any], options: Mapping[str, Any] | None = None, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The compiled programs, and seconds of each. options: of the compiler; threads: compilations side by side."""

    def one(program: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        return program.compile(compiler_options=options and dict(options)), time.perf_counter() - begin

    with ThreadPoolExecutor(threads) as pool:
        done = dict(zip(lowered, pool.map(one, lowered.values()), strict=True))
    return {name: program for name, (program, _) in done.items()}, {name: s for name, (_, s) in done.items()}


# -- in words ---------------------------------------------------------------------------------------------------------


def mebibytes(count: int) -> str:
    return f"{count / 2**20:10,.1f} MiB"


def describe(plans: list[Plan]) -> str:
    """A table for each stage."""
    lines = ["configuration, data, tokenizer, retriever, mesh and shapes fit together; every program compiles"]
    for each in plans:
        models = ", ".join(f"{name} {count:,}" for name, count in each.parameters.items())
        lines += ["", f"{each.stage}, parameters: {models}"]
        lines += [f"  {name:<16}{mebibytes(count)}" for name, count in each.parts.items() if count]
        largest = max(each.temporary, key=lambda name: each.temporary[name])
        what = "decode weights and" if largest in ROLLOUT else "gradients, batch and"
        told = f"({what} temporaries of {largest})"
        lines += [f"  {'activations':<16}{mebibytes(each.temporary[largest])}  {told}"]
        lines += [f"  {'peak a device':<16}{mebibytes(each.peak)}"]
        lines += [f"  tokens a step   {each.step_tokens:10,} at most; its rows hold {each.row_tokens:,}"]
        compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in each.compile_s.items())
        lines += [f"  compiled: {compiled}"]
    return "\n".join(lines)
