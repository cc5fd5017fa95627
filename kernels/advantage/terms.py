"""Generalised advantages as one linear recurrence: what every implementation computes before it and after.

Let S_t = gamma V_t + gamma lam A_t be what an action hands to the action before it. With delta_t = r_t + gamma V_next -
V_t and A_t = delta_t + gamma lam A_next (Schulman et al. 2016, arXiv 1506.02438, equation 16) it follows that

    A_t = r_t - V_t + S_next        S_t = gamma ((1 - lam) V_t + lam r_t) + gamma lam S_next

so that one recurrence gives both the values and the advantages of the actions behind. An observed token hands on what
it is given (b = 0, c = 1), the last token of a segment is given nothing (c = 0). With V = 0 and lam = 1, A is the
return.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Moments(NamedTuple):
    """Of the advantages of action tokens, float32; those of a row, from which those of a batch are had."""

    count: Array
    mean: Array  # 0 where there is none
    spread: Array  # sum of squared distances from the mean

    def joined(self, other: "Moments") -> "Moments":
        """Of two sets of tokens together (Chan et al. 1979): no difference of large squares is taken."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1.0)
        distance = other.mean - self.mean
        spread = self.spread + other.spread + distance * distance * self.count * share
        return Moments(count, self.mean + distance * share, spread)

    def merged(self) -> "Moments":
        """Of all rows together: ``joined`` of as many as there are."""
        count = self.count.sum()
        mean = (self.count * self.mean).sum() / jnp.maximum(count, 1)
        return Moments(count, mean, (self.spread + self.count * jnp.square(self.mean - mean)).sum())


class Advantages(NamedTuple):
    """Of the action tokens of a batch; 0 on other tokens; float32."""

    advantages: Array  # [B, T]
    targets: Array  # [B, T] advantage + value
    moments: Moments  # [B]


def structure(act: Array, segment: Array, following: Array) -> tuple[Array, Array]:
    """Is an action; is followed by a token of its own segment. following: segment of the next token, 0 at the end."""
    inside = segment > 0
    return (act > 0) & inside, inside & (following == segment)


def handed(
    rewards: Array, values: Array | float, action: Array, continues: Array, gamma: Array | float, lam: Array | float
) -> tuple[Array, Array]:
    """b and c of the recurrence of S."""
    b = jnp.where(action, gamma * ((1 - lam) * values + lam * rewards), 0.0)
    return b, jnp.where(continues, jnp.where(action, gamma * lam, 1.0), 0.0)


def advantages(
    rewards: Array, values: Array | float, action: Array, continues: Array, behind: Array
) -> tuple[Array, Array]:
    """Advantages and targets; behind: S of the next token."""
    received = rewards + jnp.where(continues, behind, 0.0)
    return jnp.where(action, received - values, 0.0), jnp.where(action, received, 0.0)
