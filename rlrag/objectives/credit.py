"""Credit: from rewards of segments to a weight for every trained token, once a batch, over all models' batches."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.advantage.group import group_zscore
from rlrag.batch import Batch
from rlrag.metrics import Metrics, Sum


class Scored(NamedTuple):
    """What credit sees: every model's batch, leaves [M, R, ...], with old and reference log-probs written."""

    batches: Mapping[str, Batch]
    num_groups: int  # static capacity
    num_episodes: int  # static capacity


# Weights [M, R, T] by model, and metrics.
Credit = Callable[[Scored], tuple[dict[str, jax.Array], Metrics]]


def per_token(values: jax.Array, batch: Batch) -> jax.Array:
    """Values of segments [M, R, S] at their tokens [M, R, T]."""
    return jnp.take_along_axis(values, batch.segment, axis=-1)


def episode_rewards(batch: Batch, num_episodes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reward, group and presence [num_episodes] of each trajectory: its calls' summed rewards, averaged over calls.

    A reward paid to every call alike therefore counts once.
    """
    s = batch.segments
    paid = jnp.any(s.valid, -1) & (s.episode >= 0)
    amount = jnp.sum(jnp.where(s.valid, s.rewards, 0.0), -1)
    # Segments that are nobody's go to one place past the end and are cut off.
    where = jnp.where(paid, s.episode, num_episodes).reshape(-1)

    def total(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.reshape(-1), where, num_episodes + 1)[:-1]

    calls = total(paid.astype(jnp.float32))
    group = jax.ops.segment_max(s.group.reshape(-1), where, num_episodes + 1)[:-1]
    return total(amount) / jnp.maximum(calls, 1), jnp.maximum(group, 0), calls > 0


def ones() -> Credit:
    """Every trained token counts alike: supervised learning."""

    def credit(scored: Scored) -> tuple[dict[str, jax.Array], Metrics]:
        return {name: batch.trained for name, batch in scored.batches.items()}, {}

    return credit


def group_relative(divide: bool = True, epsilon: float = 1e-6) -> Credit:
    """GRPO (Shao et al. 2024, section 4.1.2): the z-score of an episode's reward in its group, on all its tokens, plus
    each token's own bonus."""

    def credit(scored: Scored) -> tuple[dict[str, jax.Array], Metrics]:
        weights, metrics = {}, {}
        for name, batch in scored.batches.items():
            reward, group, present = episode_rewards(batch, scored.num_episodes)
            advantage = group_zscore(reward, group, present, scored.num_groups, divide=divide, epsilon=epsilon)
            of_segment = jnp.where(batch.segments.episode >= 0, advantage[jnp.maximum(batch.segments.episode, 0)], 0.0)
            weights[name] = (per_token(of_segment, batch) + batch.bonus) * batch.trained
            metrics |= group_metrics(advantage, group, present, scored.num_groups)
        return weights, metrics

    return credit


def group_metrics(advantage: jax.Array, group: jax.Array, present: jax.Array, num_groups: int) -> Metrics:
    """The share of groups that carry no gradient because all their rewards are equal."""
    members = jax.ops.segment_sum(present.astype(jnp.float32), group, num_groups)
    largest = jax.ops.segment_max(jnp.where(present, jnp.abs(advantage), 0.0), group, num_groups)
    there = members > 0
    return {"zero_variance_groups": Sum(jnp.sum(there & (largest <= 0)).astype(jnp.float32), jnp.sum(there) * 1.0)}
