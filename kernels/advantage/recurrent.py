"""Generalised advantages in XLA around any solver of the linear recurrence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.advantage.terms import Advantages, Moments, advantages, handed, structure

Array = jax.Array


def gae(
    recurrence: Callable[[Array, Array], Array],
    rewards: Array,
    values: Array | None,
    act: Array,
    segment: Array,
    gamma: Array,
    lam: Array,
) -> Advantages:
    """An implementation of ``advantage`` is a function with the arguments after the first.

    Args:
      recurrence: y_t = b_t + c_t y_(t+1), as ``reference.linear_recurrence``.
      rewards, values: float32 [B, T]; values None: all 0, which with lam = 1 gives returns.
      act, segment: int32 [B, T], see ``api``.
      gamma, lam: float32 [].
    """
    action, continues = structure(act, segment, _later(segment))
    value = 0.0 if values is None else values
    behind = _later(recurrence(*handed(rewards, value, action, continues, gamma, lam)))
    advantage, target = advantages(rewards, value, action, continues, behind)
    count = action.sum(-1, dtype=jnp.float32)
    mean = advantage.sum(-1) / jnp.maximum(count, 1)
    spread = jnp.where(action, jnp.square(advantage - mean[:, None]), 0).sum(-1)
    return Advantages(advantage, target, Moments(count, mean, spread))


def _later(x: Array) -> Array:
    """Of the next token, 0 behind the row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
