"""What training and evaluation are both made of: the stages of a recipe, the engine that plays them, the shape of the
model they play with, each built from an experiment and its task."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from rlrag import config
from rlrag.checkpoint import PARAMETERS, restore_parameters
from rlrag.data.task import Task
from rlrag.loading import load_function
from rlrag.mesh import local_mesh, make_mesh, num_shards
from rlrag.model.architecture import Architecture
from rlrag.model.families import CONFIG, read_architecture, read_json
from rlrag.model.folder import folder_of
from rlrag.model.hf import load_parameters
from rlrag.model.parameters import Transformer, abstract, furnished, grown, plain, reshaped, shardings
from rlrag.model.peft import begun, read_adapters
from rlrag.recipes.recipe import WARM_UP, Stage
from rlrag.retrieval.client import CachedRetriever
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine

# What a published model does not say of itself.
OWN = ("dtype", "param_dtype", "remat", "scan_unroll", "value_head", "base", "adapters")


def open_mesh(sizes: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """devices: None for all that there are."""
    return make_mesh(sizes.data, sizes.model, devices, replica=sizes.replica)


def build_stages(experiment: config.Experiment, task: Task) -> tuple[Stage, ...]:
    """The stages of the recipe an experiment names as module:function."""
    stages = load_function("recipe", experiment.recipe)(experiment, task)
    if experiment.warm_start:  # its place is kept, so that the later stages draw what they draw without one
        stages = tuple(stage._replace(steps=0) if stage.name == WARM_UP else stage for stage in stages)
    return stages


def acting_models(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Every model that speaks in some stage."""
    return tuple(dict.fromkeys(role.model for stage in stages for role in stage.recipe.roles.values()))


def check_sizes(task: Task, stages: tuple[Stage, ...], mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError, naming the field and the remedy, where a training batch cannot hold the task's episodes or be
    cut over the devices: told at the start and not when the first long episode comes."""
    longest, shards = task.workflow.max_tokens, num_shards(mesh)
    for stage in (stage for stage in stages if stage.steps):
        update, where = stage.settings.update, f"{stage.name}.update"
        if update.row_tokens < longest:
            raise ValueError(
                f"{where}.row_tokens is {update.row_tokens}, but episodes have up to {longest} tokens (the agent's "
                f"max_tokens): give --config.{where}.row_tokens={longest} or more"
            )
        if update.micro_rows % shards:
            raise ValueError(
                f"{where}.micro_rows is {update.micro_rows}: make it a multiple of the {shards} data shard(s)"
            )


def resolved(experiment: config.Experiment, directory: Path) -> config.Experiment:
    """The experiment with the shape of the published model that model.path names, where it names one.

    directory: of the run, which keeps what describes that model (folder_of). Raises ValueError where there is no such
    model, or one that is no decoder; and for adapters of no model.
    """
    own = experiment.model
    if own.adapters.path and not own.path and not experiment.warm_start:
        raise ValueError(
            f"model.adapters.path is {own.adapters.path!r}, adapters of a model that is not there: give "
            "--config.model.path=DIR, the one they were trained on"
        )
    if not own.path:
        return experiment
    folder = folder_of(own.path, directory)
    found = read_architecture(folder)
    if not isinstance(found, Architecture):
        raise ValueError(f"model.path is {own.path!r}, an encoder: a policy is a decoder")
    taken = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in OWN}
    return replace(experiment, model=replace(own, **taken))


def build_architecture(experiment: config.Experiment, task: Task) -> Architecture:
    """The experiment's model with room for every token of the task."""
    model = experiment.model
    own: dict[str, Any] = {field.name: getattr(model, field.name) for field in fields(Architecture)}
    own["vocab_size"] = max(model.vocab_size, task.tokenizer.vocab_size)
    # Rows that a published model lacks begin as the mean of its own: adapters alone could not tell them apart.
    missing = own["vocab_size"] - model.vocab_size if model.path else 0
    own["adapters"] = replace(model.adapters, rows=max(model.adapters.rows, missing))
    a = Architecture(**own)
    if a.adapters.rows > a.vocab_size:
        raise ValueError(f"model.adapters.rows is {a.adapters.rows}, the vocabulary has {a.vocab_size}: give fewer")
    return a


def load_policy(folder: Path, a: Architecture, mesh: jax.sharding.Mesh) -> Transformer:
    """The parameters of a published model laid over the mesh, with rows for the tokens that `a` has beyond its own;
    without adapters, its matrices as numbers."""
    own = replace(plain(a), vocab_size=read_json(folder / CONFIG)["vocab_size"], value_head=False)
    if (folder / PARAMETERS).is_dir():
        params = restore_parameters(folder, abstract(own, mesh))
    else:
        params = load_parameters(folder, own, mesh=mesh)
    assert isinstance(params, Transformer)
    if a.vocab_size > own.vocab_size:
        wider = replace(own, vocab_size=a.vocab_size)
        params = jax.jit(lambda p: grown(p, wider), out_shardings=shardings(wider, mesh))(params)
    return reshaped(params, a)


def furnish(params: Transformer, a: Architecture, mesh: jax.sharding.Mesh, key: jax.Array) -> Transformer:
    """Plain parameters, which are taken over, as the architecture holds them: matrices as bytes, adapters that are new
    or stand in the folders of `adapters.path`."""
    if a == plain(a):
        return params
    found = read_adapters(a) if a.adapters.path else []

    def program(params: Transformer, key: jax.Array, found: Any) -> Transformer:
        params = furnished(params, a, key)
        return begun(params, found) if found else params

    return jax.jit(program, out_shardings=shardings(a, mesh), donate_argnums=0)(params, key, found)


def build_spec(experiment: config.Experiment, task: Task) -> Spec:
    """The sizes of the sampling program of one process."""
    r, processes = experiment.rollout, jax.process_count()
    for name in ("num_slots", "prefill_rows", "max_episodes", "num_pages"):
        if getattr(r, name) % processes:
            raise ValueError(f"rollout.{name} is {getattr(r, name)}: make it a multiple of the {processes} processes")
    page, num_slots = r.page_size, r.num_slots // processes
    max_tokens = -(-task.workflow.max_tokens // page) * page
    return Spec(
        num_slots=num_slots,
        num_pages=r.num_pages // processes or 2 * num_slots * (max_tokens // page),
        page_size=page,
        max_tokens=max_tokens,
        burst=r.burst,
        prefill_rows=r.prefill_rows // processes,
        prefill_chunk=r.prefill_chunk,
        prefill_chunks=r.prefill_chunks,
        num_kept=r.num_kept,
    )


def build_engine(
    experiment: config.Experiment, task: Task, a: Architecture, mesh: jax.sharding.Mesh, models: Sequence[str]
) -> Engine:
    """The rollout engine of an experiment with its retriever, and a decoder for each model that speaks."""
    r, spec = experiment.rollout, build_spec(experiment, task)
    token_bytes, end_id = task.tokenizer.token_bytes(), task.tokenizer.end_id
    here = local_mesh(mesh)
    decoders = {model: Decoder(a, spec, token_bytes, end_id, here, r.max_stop_states) for model in models}
    s = experiment.retriever
    # Searches over the network keep the deadline themselves; others cannot be stopped, only left behind.
    deadline_s = None if s.url or s.spawn else s.deadline_s
    retriever = CachedRetriever(
        task.remote or task.index, cache_size=s.cache_size, deadline_s=deadline_s, latency_s=s.latency_s
    )
    return Engine(
        decoders, task.tokenizer.decode, retriever, max_episodes=r.max_episodes // jax.process_count(),
        search_threads=r.search_threads, search_batch=r.search_batch,
    )  # fmt: skip
