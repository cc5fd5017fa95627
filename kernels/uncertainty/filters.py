"""The filtered set of a row: top-k, top-p and allowed ids, capped at K ids that are kept for the learner."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Filters(NamedTuple):
    """Per row: what may be chosen. top_k 0 and top_p 1 keep all."""

    top_k: Array  # int [B]
    top_p: Array  # float [B]
    allowed: Array  # int [B, K]; any entry >= 0: only these ids may be emitted; -1 = unused entry

    def restricted(self) -> Array:
        """[B] bool: only listed ids may be emitted."""
        return jnp.any(self.allowed >= 0, -1)

    def filtered(self) -> Array:
        """[B] bool: not every token of the vocabulary may be emitted."""
        return (self.top_k > 0) | (self.top_p < 1) | self.restricted()


def keep(logits: Array, scale: Array, lse: Array, filters: Filters) -> tuple[Array, Array]:
    """The kept set of every row, best first: ids [B, K] (-1 = unused) and their scaled logits [B, K] (-inf).

    Order as in the logits processors of transformers: allowed ids, temperature, top-k, top-p (the smallest set whose
    probability reaches top_p, at least one id). The set is capped at the K best: a top-p set without top-k that is
    larger is cut, its tail being what K, chosen by the caller, deems negligible. Of rows that restrict nothing top_p is
    measured against the whole vocabulary; allowed ids are themselves the candidates, and top_k and top_p apply within.

    Args:
      logits: [B, V] before the temperature.
      scale: [B] inverse temperature.
      lse: [B] of the scaled logits.
      filters: rows of which nothing is filtered get a set too, which means nothing.
    """
    num_kept = filters.allowed.shape[1]
    restricted = filters.restricted()
    # A batch in which all that is filtered is restricted to listed ids (a selector's) has no use for the best of V.
    best, ids = lax.cond(
        jnp.any(filters.filtered() & ~restricted),
        lambda: largest(logits, num_kept),
        lambda: (jnp.full(filters.allowed.shape, -jnp.inf, logits.dtype), jnp.full(filters.allowed.shape, -1)),
    )
    listed = jnp.take_along_axis(logits, jnp.maximum(filters.allowed, 0), -1)
    listed, order = lax.top_k(jnp.where(filters.allowed >= 0, listed, -jnp.inf), num_kept)
    ids = jnp.where(restricted[:, None], jnp.take_along_axis(filters.allowed, order, -1), ids)
    values = jnp.where(restricted[:, None], listed, best).astype(jnp.float32) * scale[:, None]
    rank = jnp.arange(num_kept)
    inside = (ids >= 0) & ((filters.top_k == 0)[:, None] | (rank < filters.top_k[:, None]))
    within = jax.nn.logsumexp(jnp.where(inside, values, -jnp.inf), -1)
    total = jnp.where(restricted | (filters.top_k > 0), within, lse)
    probability = jnp.where(inside, jnp.exp(values - total[:, None]), 0.0)
    mass_before = jnp.cumsum(probability, -1) - probability
    inside &= (mass_before < filters.top_p[:, None]) | (rank == 0)
    return jnp.where(inside, ids, -1), jnp.where(inside, values, -jnp.inf)


def largest(logits: Array, number: int) -> tuple[Array, Array]:
    """As ``lax.top_k(logits, number)``, in two levels: the best blocks of a row, then the best of their entries.

    The ``number`` largest lie in the ``number`` blocks of largest maximum, because each of these holds one entry that
    is no smaller than all outside. Ties go to the smaller id at both levels, as in ``lax.top_k``, since the blocks
    chosen are put back in order. On CPU the one-level form costs 2.5 times the whole draw (docs/LOG.md).
    """
    rows, vocabulary = logits.shape
    places = min(number, vocabulary)
    block = 1 << round(math.log2(max(vocabulary / max(places, 1), 1)) / 2)  # about as many blocks as candidates
    if vocabulary % block or 4 * block * places > vocabulary:
        values, ids = lax.top_k(logits, places)
    else:
        blocks = logits.reshape(rows, -1, block)
        _, chosen = lax.top_k(blocks.max(-1), places)
        chosen = jnp.sort(chosen, -1)
        candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
        values, at = lax.top_k(candidates, places)
        ids = jnp.take_along_axis(chosen, at // block, -1) * block + at % block
    unused = ((0, 0), (0, number - places))
    return jnp.pad(values, unused, constant_values=-jnp.inf), jnp.pad(ids, unused, constant_values=-1)
