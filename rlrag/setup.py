"""What training and evaluation are both made of: the stages of a recipe, the engine that plays them, the shape of the
model they play with, each built from an experiment and its task."""

from collections.abc import Sequence
from dataclasses import replace

import jax

from rlrag import config
from rlrag.data.task import Task
from rlrag.loading import load_function
from rlrag.mesh import DATA
from rlrag.model.architecture import Architecture
from rlrag.recipes.recipe import WARM_UP, Stage
from rlrag.retrieval.client import CachedRetriever
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine


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
    longest, shards = task.workflow.max_tokens, mesh.shape[DATA]
    for stage in stages:
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


def build_architecture(experiment: config.Experiment, task: Task) -> Architecture:
    """The experiment's model with room for every token of the task."""
    return replace(experiment.model, vocab_size=max(experiment.model.vocab_size, task.tokenizer.vocab_size))


def build_spec(experiment: config.Experiment, task: Task) -> Spec:
    """The sizes of the sampling program."""
    r = experiment.rollout
    page = r.page_size
    max_tokens = -(-task.workflow.max_tokens // page) * page
    return Spec(
        num_slots=r.num_slots,
        num_pages=r.num_pages or 2 * r.num_slots * (max_tokens // page),
        page_size=page,
        max_tokens=max_tokens,
        burst=r.burst,
        prefill_rows=r.prefill_rows,
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
    decoders = {model: Decoder(a, spec, token_bytes, end_id, mesh, r.max_stop_states) for model in models}
    s = experiment.retriever
    # Searches over the network keep the deadline themselves; others cannot be stopped, only left behind.
    deadline_s = None if s.url or s.spawn else s.deadline_s
    retriever = CachedRetriever(
        task.remote or task.index, cache_size=s.cache_size, deadline_s=deadline_s, latency_s=s.latency_s
    )
    return Engine(
        decoders, task.tokenizer.decode, retriever,
        max_episodes=r.max_episodes, search_threads=r.search_threads, search_batch=r.search_batch,
    )  # fmt: skip
