"""The plain implementation: log-softmax, one cumulative sum over the vocabulary, one pass for each statistic.

An implementation of ``uncertainty`` is a function with the signature of ``draw``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Drawn(NamedTuple):
    """One token a row of softmax(scale * logits), and what that distribution says; [B] each, float32 but the token."""

    token: Array  # int32
    logit: Array  # of the token, scaled
    lse: Array  # nats
    entropy: Array  # nats
    certainty: Array  # nats, KL(uniform || p)
    first: Array  # the largest scaled logit
    second: Array  # the next, equal ones counted twice


def draw(logits: Array, uniform: Array, scale: Array, greedy: Array, masked: bool = True) -> Drawn:
    """The token with the smallest id whose cumulative weight exceeds uniform times the total; statistics of its row.

    Args:
      logits: [B, V]; -inf is outside the vocabulary of the row and never drawn where anything else can be.
      uniform: [B] float32 in [0, 1).
      scale: [B] float32 inverse temperature.
      greedy: [B] bool; true takes the largest logit, the first of equal ones.
      masked: whether -inf logits may occur; looked for here in any case.
    """
    del masked
    logits = logits.astype(jnp.float32) * scale[:, None]
    present = logits > -jnp.inf
    count = jnp.maximum(present.sum(-1), 1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    log_p = jnp.where(present, logits - lse[:, None], 0)
    p = jnp.where(present, jnp.exp(log_p), 0)
    entropy = -(p * log_p).sum(-1)
    certainty = jnp.where(present.any(-1), -log_p.sum(-1) / count - jnp.log(count), 0)
    token = jnp.where(greedy, jnp.argmax(logits, -1).astype(jnp.int32), first_above(p, uniform)[0])
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return Drawn(token, logit, lse, entropy, certainty, *top_two(logits))


def first_above(weights: Array, fraction: Array) -> tuple[Array, Array]:
    """First index of [B, M] whose cumulative weight exceeds fraction * total, and the weight before it."""
    cumulative = jnp.cumsum(weights, -1)
    # Rounding may push the target past either end: never choose an entry of weight zero.
    target = jnp.maximum(fraction, 0) * cumulative[:, -1]
    index = jnp.sum(cumulative <= target[:, None], -1, dtype=jnp.int32)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[-1], dtype=jnp.int32), 0), -1)
    index = jnp.minimum(index, last)
    before = jnp.where(index > 0, jnp.take_along_axis(cumulative, jnp.maximum(index - 1, 0)[:, None], -1)[:, 0], 0.0)
    return index, before


def top_two(logits: Array) -> tuple[Array, Array]:
    """The two largest values of each row, [B] and [B], by reductions alone.

    On CPU ``lax.top_k(logits, 2)`` whose result is sliced becomes a full sort: 35 ms at [64, 4096] against 0.5 ms here.
    """
    first = logits.max(-1)
    below = logits < first[:, None]
    second = jnp.where(below, logits, -jnp.inf).max(-1)
    tied = jnp.sum(~below, axis=-1, dtype=jnp.int32) > 1
    return first, jnp.where(tied, first, second)
