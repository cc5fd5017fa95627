"""Drawing one token a row: filters, greedy, and inverse-CDF sampling from one uniform number.

Samples depend on (root key, stream, position) alone, never on the slot, the batch-mates or the device count. The ids
the sampler could choose from are returned where anything was filtered, so that the learner can renormalise over
exactly the same set.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlrag.model.attention import MASKED

BLOCK = 64  # vocabulary block of the two-level inverse CDF


Array = Any  # of a round's inbox: jax.Array in the program, numpy on the host, PartitionSpec in its layout


class Controls(NamedTuple):
    """Per row: how to sample. temperature 0 is greedy; top_k 0 and top_p 1 keep all; allowed -1 = unused entry."""

    temperature: Array  # float [B]
    top_k: Array  # int [B]
    top_p: Array  # float [B]
    allowed: Array  # int [B, K]; any entry >= 0: only these ids may be emitted


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse CDF, two levels: the block by block sums, then the token inside it. logits [B, V], uniform [B] in [0, 1).

    The smallest index whose cumulative weight exceeds uniform * total. Two short cumulative sums read the row once;
    one cumulative sum over V costs six times as much on CPU (docs/LOG.md).
    """
    B, V = logits.shape
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    blocks = -(-V // BLOCK)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - V))).reshape(B, blocks, BLOCK)
    block, before = first_above(weights.sum(-1), uniform)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    total = weights.sum((-1, -2))
    within, _ = first_above(inside, (uniform * total - before) / inside.sum(-1))
    return block * BLOCK + within


def first_above(weights: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of [B, M] whose cumulative weight exceeds fraction * total, and the weight before it."""
    cumulative = jnp.cumsum(weights, -1)
    # Rounding may push the target past either end: never choose an entry of weight zero.
    target = jnp.maximum(fraction, 0) * cumulative[:, -1]
    index = jnp.sum(cumulative <= target[:, None], -1)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[-1]), 0), -1)
    index = jnp.minimum(index, last)
    before = jnp.where(index > 0, jnp.take_along_axis(cumulative, jnp.maximum(index - 1, 0)[:, None], -1)[:, 0], 0.0)
    return index.astype(jnp.int32), before


def keep(logits: jax.Array, controls: Controls) -> tuple[jax.Array, jax.Array]:
    """The filtered set of each row: ids [B, K] (-1 = unused) and logits there [B, K], at the row's temperature.

    top_p is applied to the distribution left by top_k (temperature, then top_k, then top_p, as in transformers); with
    top_k 0 the nucleus is cut to K ids. Allowed ids replace the candidates, and top_k and top_p apply within them.
    """
    K = controls.allowed.shape[1]
    scaled = logits.astype(jnp.float32) / jnp.where(controls.temperature > 0, controls.temperature, 1.0)[:, None]
    values, ids = jax.lax.top_k(scaled, K)
    restricted = jnp.any(controls.allowed >= 0, -1, keepdims=True)
    allowed_values = jnp.take_along_axis(scaled, jnp.maximum(controls.allowed, 0), -1)
    allowed_values, order = jax.lax.top_k(jnp.where(controls.allowed >= 0, allowed_values, MASKED), K)
    ids = jnp.where(restricted, jnp.take_along_axis(controls.allowed, order, -1), ids)
    values = jnp.where(restricted, allowed_values, values)
    rank = jnp.arange(K)
    inside = (ids >= 0) & ((controls.top_k == 0)[:, None] | (rank < controls.top_k[:, None]))
    limited = restricted[:, 0] | (controls.top_k > 0)
    lse = jax.nn.logsumexp(jnp.where(inside, values, MASKED), -1)
    lse = jnp.where(limited, lse, jax.nn.logsumexp(scaled, -1))
    probability = jnp.where(inside, jnp.exp(values - lse[:, None]), 0.0)
    mass_before = jnp.cumsum(probability, -1) - probability
    inside &= (mass_before < controls.top_p[:, None]) | (rank == 0)
    return jnp.where(inside, ids, -1), jnp.where(inside, values, MASKED)


def sample(logits: jax.Array, uniform: jax.Array, controls: Controls) -> tuple[jax.Array, jax.Array]:
    """One token a row, and the ids it could have been: tokens [B], kept [B, K] (all -1: the whole vocabulary)."""
    greedy = controls.temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, controls.temperature)[:, None]
    B, K = controls.allowed.shape
    filtered = (controls.top_k > 0) | (controls.top_p < 1) | jnp.any(controls.allowed >= 0, -1)

    def everything(_) -> tuple[jax.Array, jax.Array]:
        drawn = jax.lax.cond(
            jnp.any(greedy),
            lambda: jnp.where(greedy, jnp.argmax(scaled, -1).astype(jnp.int32), draw(scaled, uniform)),
            lambda: draw(scaled, uniform),
        )
        return drawn, jnp.full((B, K), -1, jnp.int32)

    def within(_) -> tuple[jax.Array, jax.Array]:
        ids, values = keep(logits, controls)
        place, _ = first_above(jnp.exp(values - jnp.max(values, -1, keepdims=True)), uniform)
        # The kept ids are sorted by logit, so the greedy choice is the first.
        chosen = jnp.take_along_axis(ids, jnp.where(greedy, 0, place)[:, None], -1)[:, 0]
        drawn, _ = everything(None)
        return jnp.where(filtered, chosen, drawn), jnp.where(filtered[:, None], ids, -1)

    if K == 0:
        return everything(None)
    return jax.lax.cond(jnp.any(filtered), within, everything, None)
