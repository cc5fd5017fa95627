"""Scores of a micro-batch under given parameters: one forward pass of the trunk, then token statistics."""

import jax
import jax.numpy as jnp

from kernels.log_prob.api import token_stats
from kernels.token_stats import filtered_log_prob
from rlrag.batch import Batch
from rlrag.mesh import MODEL
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer
from rlrag.model.transformer import trunk
from rlrag.objectives.losses import Scores


def score(params: Transformer, a: Architecture, batch: Batch, key: jax.Array | None = None) -> Scores:
    """Log-prob, entropy and certainty of every trained token given what precedes it, 0 elsewhere, and the value of
    every token; leaves of batch are [R, ...]. key: of the adapters' dropout; None: without.

    What an objective does not look at is not computed: the compiler drops it. The head, which costs as much as several
    layers of a small model, is multiplied for trained tokens alone: they are moved to the front of their rows.
    """
    table = batch.segments
    hidden = trunk(params, a, batch.tokens, batch.positions, batch.segment, table.parent, table.adapters, key)
    # The column before predicts; a segment's first token is observed, so no trained token looks across a boundary.
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    trained = batch.act > 0
    order = jnp.argsort(~trained, axis=-1, stable=True)  # [R, T] trained columns, then the others
    place = jnp.argsort(order, axis=-1)  # [R, T] where each column has gone
    ids = rearranged(jnp.concatenate([batch.tokens[..., None], batch.kept], -1), order, place)
    temperature = rearranged(batch.temperature, order, place)
    head = params.output_head.astype(before.dtype)
    stats = token_stats(
        rearranged(before, order, place), head, ids, temperature=temperature,
        num_devices=num_parts(head.shape[0]), count=jnp.max(jnp.sum(trained, -1)),
    )  # fmt: skip
    logp = filtered_log_prob(stats.logits[..., 0], stats.lse, stats.logits[..., 1:])

    def back(values: jax.Array) -> jax.Array:
        return jnp.where(trained, rearranged(values, place, order), 0.0)

    if params.value_head is None:
        value = jnp.zeros_like(logp)
    else:
        value = before.astype(jnp.float32) @ params.value_head.astype(jnp.float32)
    return Scores(back(logp), back(stats.entropy), back(stats.certainty), value)


@jax.custom_vjp
def rearranged(values: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """values [R, T, ...] with column order[r, t] of each row at t; place: the inverse permutation, by which the
    gradient goes back. (The gradient that JAX derives is a scatter, which is slow on CPU and adds where nothing
    is to add.)"""
    return jnp.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)


rearranged.defvjp(
    lambda values, order, place: (rearranged(values, order, place), (order, place)),
    lambda permutations, gradient: (rearranged(gradient, *reversed(permutations)), None, None),
)


def num_parts(vocab_size: int) -> int:
    """Over how many devices the logits of a micro-batch lie: rows over all axes but `model`, the vocabulary over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return mesh.size if vocab_size % mesh.shape[MODEL] == 0 else mesh.size // mesh.shape[MODEL]


def no_scores(batch: Batch) -> Scores:
    """Stand-ins where only an objective's counts are wanted."""
    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    return Scores(zeros, zeros, zeros, zeros)
