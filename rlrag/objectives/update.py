"""The update: three jitted pure functions, prepare, accumulate and apply, compiled once each.

prepare scores what the objectives need and writes credit, over all models at once; accumulate adds one micro-batch's
gradient, already divided by the whole minibatch's counts; apply steps the optimizer; these two each model has its own
of. Nothing depends on how many micro-batches there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlrag.batch import Batch
from rlrag.mesh import num_shards, put_rows, rows_sharding
from rlrag.metrics import Metrics, merge, nothing
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer, abstract, joined, learning, part, shardings
from rlrag.objectives.credit import Credit, Scored
from rlrag.objectives.losses import Objective, Scores
from rlrag.objectives.scoring import no_scores, score

Scorer = Callable[..., Scores]  # as scoring.score


@flax.struct.dataclass
class TrainState:
    """What one model's optimisation carries from step to step."""

    params: Transformer
    opt_state: Any  # optax's, of build_optimizer, over what learns
    step: jax.Array  # optimizer steps taken, skipped ones included


class Prepared(NamedTuple):
    batches: dict[str, Batch]
    counts: dict[str, dict[str, jax.Array]]  # model -> loss term -> [M] count of each micro-batch
    metrics: Metrics


class Applied(NamedTuple):
    grad_norm: jax.Array
    skipped: jax.Array  # 1 where a non-finite gradient was dropped, parameters and optimizer state untouched
    learning_rate: jax.Array


class Update:
    """The three programs of one model under one objective. Gradients, and what the optimizer keeps, are of the
    parameters that learn alone: of its tree with None in place of the others."""

    def __init__(
        self,
        a: Architecture,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: Mesh,
        trains: str = "",
        seed: int = 0,
        score: Scorer = score,
    ):
        """trains: paths of the parameters that learn (parameters.learning); seed: of what dropout drops; score: how a
        micro-batch is scored (another only to measure it)."""
        self.architecture, self.objective, self.optimizer, self.mesh = a, objective, optimizer, mesh
        self.learns = learning(a, trains)
        own, replicated = self.own(shardings(a, mesh)), NamedSharding(mesh, PartitionSpec())
        self.accumulate = jax.jit(
            partial(accumulate, a, objective, self.learns, seed, score),
            donate_argnums=(1, 2),
            out_shardings=(own, replicated),
        )
        self.apply = jax.jit(
            partial(apply, optimizer, schedule, self.learns), donate_argnums=0, out_shardings=(self.where(), replicated)
        )
        self._zeros = jax.jit(lambda: self.gradients(), out_shardings=own)
        self._empty: Callable[[], Metrics] | None = None

    def own(self, tree: Any) -> Any:
        """Of a tree like the parameters what learns."""
        return part(tree, self.learns)

    def gradients(self) -> Any:
        """What gradients are added up from: zeros, float32 whatever the parameters are."""
        own = self.own(abstract(self.architecture, self.mesh))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), own)

    def initialize(self, params: Any) -> TrainState:
        """A fresh state around params (which it takes over), laid out over the mesh."""
        where = self.where()
        params = jax.device_put(params, where.params)
        opt_state = jax.jit(self.optimizer.init, out_shardings=where.opt_state)(self.own(params))
        return TrainState(params, opt_state, jax.device_put(np.int32(0), where.step))

    def where(self) -> TrainState:
        """The sharding of every leaf of the state. It is spelled out for what goes in and what comes out: what the
        compiler would choose may differ from one to the other, and then every program is compiled twice."""
        a, replicated = self.architecture, NamedSharding(self.mesh, PartitionSpec())
        params = shardings(a, self.mesh)
        # optax keeps moments in trees of the parameters' shape: map those like the parameters, the rest replicated.
        shapes = jax.eval_shape(self.optimizer.init, self.own(abstract(a, self.mesh)))
        opt_state = optax.tree_utils.tree_map_params(
            self.optimizer, lambda _, spec: spec, shapes, self.own(params), transform_non_params=lambda _: replicated
        )
        return TrainState(params, opt_state, replicated)  # type: ignore[arg-type]  # shardings in the state's tree

    def put(self, batch: Batch) -> Batch:
        """A packed batch [M, R, ...] onto the mesh, rows over `data`; in several processes, of the rows of this one."""
        rows, shards = batch.tokens.shape[1] * jax.process_count(), num_shards(self.mesh)
        if rows % shards:
            raise ValueError(f"update.micro_rows is {rows}: make it a multiple of the {shards} data shard(s)")
        return put_rows(batch, self.mesh)

    def step(
        self,
        state: TrainState,
        batch: Batch,
        counts: dict[str, jax.Array],
        coefficients: Mapping[str, np.float32],
        micros: Sequence[int],
    ) -> tuple[TrainState, Metrics, Applied]:
        """One optimizer step on the micro-batches `micros` of a prepared batch. coefficients: of loss terms, 1 where
        absent; other names are ignored."""
        chosen = np.zeros(batch.tokens.shape[0], np.float32)
        chosen[list(micros)] = 1
        grads, sums = self._zeros(), self.no_metrics(batch)
        for index in micros:
            grads, sums = self.accumulate(
                state.params, grads, sums, batch, counts, dict(coefficients), chosen, np.int32(index), state.step
            )
        state, applied = self.apply(state, grads)
        return state, sums, applied

    def no_metrics(self, batch: Batch) -> Metrics:
        """What metrics of this objective begin with. batch: any, for its shapes."""
        if self._empty is None:  # the names of an objective's metrics do not change: trace it once
            micro = jax.eval_shape(lambda b: select(b, 0), batch)
            like = jax.eval_shape(lambda b: reported(self.objective, no_scores(b), b)[1], micro)
            replicated = NamedSharding(self.mesh, PartitionSpec())
            self._empty = jax.jit(lambda: jax.tree.map(jnp.asarray, nothing(like)), out_shardings=replicated)
        return self._empty()


def select(batch: Batch, index: jax.Array | int) -> Batch:
    """Micro-batch `index` of a batch: leaves [R, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), batch)


def reported(objective: Objective, scores, micro: Batch) -> tuple[dict, Metrics]:
    """Loss terms, and all metrics with the losses among them."""
    terms = objective.terms(scores, micro)
    return terms.losses, {**terms.metrics, **{f"loss/{name}": value for name, value in terms.losses.items()}}


def accumulate(
    a, objective, learns, seed, score: Scorer, params, grads, sums, batch, counts, coefficients, chosen, index, step
):
    """grads + gradient of micro-batch `index`; sums + its metrics. Each loss term is divided by its count over the
    chosen micro-batches, so the split into micro-batches changes nothing, and multiplied by its coefficient."""
    micro = select(batch, index)
    # Every micro-batch of every step drops other inputs of the adapters.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index) if a.adapters.dropout else None

    def loss(own):
        losses, metrics = reported(objective, score(joined(own, params), a, micro, key), micro)
        total = sum(
            coefficients.get(name, 1.0) * term.total / jnp.maximum(jnp.sum(counts[name] * chosen), 1.0)
            for name, term in losses.items()
        )
        return total, metrics

    new, metrics = jax.grad(loss, has_aux=True)(part(params, learns))
    return jax.tree.map(jnp.add, grads, new), merge(sums, jax.lax.stop_gradient(metrics))


def apply(optimizer, schedule, learns, state: TrainState, grads) -> tuple[TrainState, Applied]:
    """One optimizer step."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)))
    # Numbers that are finite but too large to square leave no direction to step in either.
    grads = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), leaf, jnp.nan), grads)
    # The optimizer's own count stands still in a skipped step, and so does its schedule.
    learning_rate = jnp.asarray(schedule(state.step - state.opt_state.total_notfinite))
    own = part(state.params, learns)
    updates, opt_state = optimizer.update(grads, state.opt_state, own)
    own = jax.tree.map(lambda leaf, update: (leaf + update).astype(leaf.dtype), own, updates)
    params = joined(own, state.params)
    skipped = 1.0 - opt_state.last_finite.astype(jnp.float32)
    return TrainState(params, opt_state, state.step + 1), Applied(norm, skipped, learning_rate)


def build_prepare(
    architectures: Mapping[str, Architecture],
    objectives: Mapping[str, Objective],
    reads: Mapping[str, str],
    credit: Credit,
    num_groups: int,
    num_episodes: int,
    mesh: Mesh,
) -> Callable:
    """The jitted prepare(params, references, batches, num_micro, coefficients) -> Prepared over all models of a recipe.

    params: by model; references: by model, in place of what learns of it, None where there is no need; batches: by
    model that acts; reads: learning model -> whose batch; num_micro: [] int by batch, micro-batches in use;
    coefficients: the recipe's.
    """

    def write(batch: Batch, fields: Mapping[str, str], name: str, params, num_micro: jax.Array) -> Batch:
        """The batch with fields (of the batch -> of Scores) as the model says them."""

        def one(index: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
            # Of a single micro-batch nothing in here depends on the index: without the barrier the compiler moves the
            # scoring in front of the loop, where it is paid for even if the loop has no turn.
            micro, _ = jax.lax.optimization_barrier((select(batch, index), index))
            scores = score(params, architectures[name], micro)
            new = [getattr(scores, source) for source in fields.values()]
            return [jax.lax.dynamic_update_index_in_dim(old, x, index, 0) for old, x in zip(values, new, strict=True)]

        values = jax.lax.fori_loop(0, num_micro, one, [getattr(batch, field) for field in fields])
        return replace(batch, **dict(zip(fields, values, strict=True)))

    def scored_by(name: str, batch: Batch, params, references, num_micro: jax.Array) -> Batch:
        """The batch with what the model's objective needs."""
        objective = objectives[name]
        fields = {"old_logp": "logp"} if objective.recompute_old else {}
        fields |= {"value": "value"} if "value" in objective.needs else {}
        if fields:
            batch = write(batch, fields, name, params[name], num_micro)
        if "old_logp" in objective.needs and not objective.recompute_old:
            # The sampler said nothing of forced tokens: where there are any, the learner scores the batch.
            forced = batch.trained > batch.sampled
            micros = jnp.where(jnp.any(forced), num_micro, 0)
            learner = write(batch, {"old_logp": "logp"}, name, params[name], micros).old_logp
            batch = replace(batch, old_logp=jnp.where(forced, learner, batch.logp))
        if "ref_logp" in objective.needs:
            batch = write(batch, {"ref_logp": "logp"}, name, joined(references[name], params[name]), num_micro)
        return batch

    def prepare(params, references, batches: dict[str, Batch], num_micro, coefficients) -> Prepared:
        scored = dict(batches)
        for name, source in reads.items():
            scored[source] = scored_by(name, scored[source], params, references, num_micro[source])
        prepared, metrics = credit(Scored(scored, coefficients, num_groups, num_episodes))

        def count(objective: Objective, micro: Batch) -> dict[str, jax.Array]:
            # Counts come from the batch alone, so the forward pass behind the stand-ins is never run.
            return {name: term.count for name, term in objective.terms(no_scores(micro), micro).losses.items()}

        counts = {name: jax.vmap(partial(count, objectives[name]))(prepared[source]) for name, source in reads.items()}
        return Prepared(prepared, counts, metrics)

    # Every process reads the metrics: they must not lie on the devices of some.
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(prepare, donate_argnums=2, out_shardings=Prepared(rows_sharding(mesh), replicated, replicated))  # type: ignore[arg-type]
