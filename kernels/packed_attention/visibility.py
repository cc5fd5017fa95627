"""Who sees whom in a packed row, as three numbers a token: what every implementation is given in place of a mask.

Segments form a forest, and a token sees the tokens before it in its own segment and in the ancestors of that. Visited
depth first, the descendants of a segment are an interval of numbers: token i sees token j iff j <= i and

    first_j <= first_i < last_j     (and position_i - position_j < window)

so that a block of a mask is a comparison of two short vectors, and whether any of it is True one of their bounds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Visibility(NamedTuple):
    """Of every token, int32."""

    first: Array  # [B, T] number of its segment, visited depth first
    last: Array  # [B, T] one more than the number of the last descendant of its segment
    position: Array  # [B, T] in its conversation
    window: Array | None = None  # [] how many tokens a query looks back by positions, itself included; None: over all

    def padded(self, more: int) -> "Visibility":
        """With `more` columns that see nothing and that nothing sees."""
        first, last, position = (
            jnp.pad(each, ((0, 0), (0, more)), constant_values=value)
            for each, value in ((self.first, -1), (self.last, -1), (self.position, 0))
        )
        return Visibility(first, last, position, self.window)


def visible(v: Visibility) -> Array:
    """The mask [B, T, T] bool, written out."""
    return _mask(v.first, v.first, v.last, v.position, v.position, 0, 0, v.window)


def seen(v: Visibility, row: Array, i: Array, j: Array, queries: int, keys: int) -> Array:
    """The mask's block [queries, keys] of one row that begins at query i and key j."""

    def query(values: Array) -> Array:
        return lax.dynamic_slice(values, (row, i), (1, queries))

    def key(values: Array) -> Array:
        return lax.dynamic_slice(values, (row, j), (1, keys))

    (own,) = _mask(query(v.first), key(v.first), key(v.last), query(v.position), key(v.position), i, j, v.window)
    return own


def _mask(first_i, first_j, last_j, position_i, position_j, i, j, window) -> Array:
    queries, keys = jnp.arange(first_i.shape[-1]), jnp.arange(first_j.shape[-1])
    own = (i + queries[:, None] >= j + keys) & (first_j[:, None] <= first_i[..., None])
    own &= first_i[..., None] < last_j[:, None]
    return own if window is None else own & (position_i[..., None] - position_j[:, None] < window)


def live_blocks(v: Visibility, queries: int, keys: int) -> Array:
    """[B, T / queries, T / keys] bool: False where no query of a block sees any key of the other; by bounds, so that a
    few that are True hold nothing either. T must be a multiple of both."""

    def bounds(values: Array, size: int) -> tuple[Array, Array]:
        cut = values.reshape(values.shape[0], -1, size)
        return jnp.min(cut, -1), jnp.max(cut, -1)

    (low, high), (begin, _), (_, end) = bounds(v.first, queries), bounds(v.first, keys), bounds(v.last, keys)
    last_query = (jnp.arange(low.shape[1]) + 1) * queries - 1
    live = last_query[:, None] >= jnp.arange(begin.shape[1]) * keys
    live = live & (begin[:, None] <= high[..., None]) & (low[..., None] < end[:, None])
    if v.window is not None:
        (nearest, _), (_, farthest) = bounds(v.position, queries), bounds(v.position, keys)
        live &= nearest[..., None] - farthest[:, None] < v.window
    return live
