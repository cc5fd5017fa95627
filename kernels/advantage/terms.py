"""Generalised advantages as one linear recurrence: what every implementation computes before it and after.

Let S_t = gamma V_t + gamma lam A_t be what an action hands to the action before it. With delta_t = r_t + gamma V_next -
V_t and A_t = delta_t + gamma lam A_next (Schulman et al. 2016, arXiv 1506.02438, equation 16) it follows that

    A_t = r_t - V_t + S_next        S_t = gamma ((1 - lam) V_t + lam r_t) + gamma lam S_next

so that one recurrence gives both the values and the advantages of the actions behind. An observed token hands on what
it is given (b = 0, c = 1), the last token of a segment is given nothing (c = 0). With V = 0 and lam = 1, A is the
return.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Moments(NamedTuple):
    """Of the advantages of action tokens, float32; those of a row or a group, from which those of a batch are had."""

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

    def merged(self, axis: int | None = None) -> "Moments":
        """Of all rows together, or all along the leading axis (0): ``joined`` of as many as there are."""
        between = moments(self.mean, self.count, lambda x: x.sum(axis))
        return between._replace(spread=self.spread.sum(axis) + between.spread)


class Advantages(NamedTuple):
    """Of the action tokens of a batch; 0 on other tokens; float32."""

    advantages: Array  # [B, T]
    targets: Array  # [B, T] advantage + value
    moments: Moments  # [B]
    groups: Moments | None  # [num_groups], where tokens have groups


def moments(
    values: Array,
    weight: Array,
    total: Callable[[Array], Array] = jnp.sum,
    back: Callable[[Array], Array] = lambda x: x,
) -> Moments:
    """Of values that count `weight` times each (0: whatever they are).

    In two passes, of which the second corrects the mean by what rounding has cost the first (Chan, Golub and LeVeque
    1983, equation 1.7): of rewards 1000 +- 0.1 the float32 sum has lost what tells them apart.

    Args:
      total: the sum of values, over all or by row, group ...
      back: to each value what `total` gives of its own.
    """
    count = total(weight)
    least = jnp.maximum(count, 1.0)
    first = total(weight * jnp.where(weight > 0, values, 0.0)) / least
    away = jnp.where(weight > 0, values - back(first), 0.0)
    rest = total(weight * away) / least
    return Moments(count, first + rest, jnp.maximum(total(weight * away * away) - count * rest * rest, 0.0))


def by_group(
    table: Moments, values: Array, action: Array, group: Array, num_groups: int, place: Array,
    total: Callable[[Array], Array] = jnp.sum,
) -> Moments:  # fmt: skip
    """A kernel's table of groups with the values of action tokens of a block.

    One turn a group, from the lowest to the highest that the block has: the groups of a row are few, and neighbours,
    because a group's answers are packed together. (A product with one-hot rows would be as wide as there are groups.)

    Args:
      table: float32 [..., G'], G' >= num_groups; place: int32 of its shape, the group of each place.
      total: of values, by row of the block where the table has rows.
    """
    counted = action & (group >= 0) & (group < num_groups)
    first = jnp.min(jnp.where(counted, group, num_groups))
    last = jnp.max(jnp.where(counted, group, -1))

    def one(number: Array, table: Moments) -> Moments:
        found = moments(values, jnp.where(counted & (group == number), 1.0, 0.0), total)
        here = place == number
        return table.joined(Moments(*(jnp.where(here, each, 0.0) for each in found)))

    return lax.fori_loop(first, last + 1, one, table)


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
