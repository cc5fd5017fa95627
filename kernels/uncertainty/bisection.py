"""The lower level of the inverse CDF where there is no cumulative sum: inside a Pallas kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Reduce = Callable[[Array], Array]  # of an array of entries, to one number a row

NOWHERE = 2**30


def first_above(weights: Array, index: Array, target: Array, size: int, total: Reduce) -> Array:
    """The smallest index whose cumulative weight exceeds the target, or is all there is: never one of weight zero.

    Each step is one masked sum. In float32 too it cannot fall as the border moves right: the same additions in the same
    order, some of them of 0 in place of a positive number.

    Args:
      weights: of the entries, none negative.
      index: of the entries, 0 ... size - 1; the order in memory does not matter.
      target: one number a row.
      size: static.
      total: the sum of the entries of each row.
    """
    everything = total(weights)
    target = jnp.maximum(target, 0.0)  # rounding may put it before the first entry

    def halve(_, borders: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = borders
        middle = (low + high) >> 1  # not //, which on TPU asks which chip it is
        cumulative = total(jnp.where(index <= middle, weights, 0.0))
        reached = (cumulative > target) | (cumulative >= everything)
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    start = jnp.zeros_like(everything, jnp.int32)
    return lax.fori_loop(0, (size - 1).bit_length(), halve, (start, start + (size - 1)))[0]


def first_true(found: Array, index: Array, greatest: Reduce) -> Array:
    """The smallest index where found; ``greatest`` is the maximum of each row."""
    return -greatest(jnp.where(found, -index, -NOWHERE))
