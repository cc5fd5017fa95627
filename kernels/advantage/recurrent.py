"""Generalised advantages in XLA around any solver of the linear recurrence."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.advantage.group import group_moments
from kernels.advantage.terms import Advantages, Moments, advantages, handed, moments, structure

Array = jax.Array


def gae(
    recurrence: Callable[[Array, Array], Array],
    rewards: Array,
    values: Array | None,
    act: Array,
    segment: Array,
    gamma: Array,
    lam: Array,
    group: Array | None = None,
    num_groups: int = 0,
) -> Advantages:
    """An implementation of ``advantage`` is a function with the arguments after the first.

    Args:
      recurrence: y_t = b_t + c_t y_(t+1), as ``reference.linear_recurrence``.
      rewards, values: float32 [B, T]; values None: all 0, which with lam = 1 gives returns.
      act, segment: int32 [B, T], see ``api``.
      gamma, lam: float32 [].
      group: int32 [B, T] or None, see ``api``; num_groups: static.
    """
    action, continues = structure(act, segment, _later(segment))
    value = 0.0 if values is None else values
    behind = _later(recurrence(*handed(rewards, value, action, continues, gamma, lam)))
    advantage, target = advantages(rewards, value, action, continues, behind)
    own = moments(advantage, action.astype(jnp.float32), functools.partial(jnp.sum, axis=1, keepdims=True))
    groups = None
    if group is not None:
        of_row = functools.partial(group_moments, num_groups=num_groups)
        groups = jax.vmap(of_row)(advantage, group, action).merged(0)
    return Advantages(advantage, target, Moments(*(each[:, 0] for each in own)), groups)


def _later(x: Array) -> Array:
    """Of the next token, 0 behind the row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
