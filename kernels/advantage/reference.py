"""The plain implementation: one step of ``lax.scan`` a token.

An implementation of the recurrence is a function with this signature.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def linear_recurrence(b: Array, c: Array) -> Array:
    """y_t = b_t + c_t y_(t+1) with y_(T+1) = 0; b, c and y are [B, T]."""

    def step(following: Array, terms: tuple[Array, Array]) -> tuple[Array, Array]:
        b_t, c_t = terms
        y = b_t + c_t * following
        return y, y

    _, y = lax.scan(step, jnp.zeros_like(b[:, 0]), (b.T, c.T), reverse=True)
    return y.T
