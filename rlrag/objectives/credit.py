"""Credit: from rewards of segments to a weight for every trained token, once a batch, over all models' batches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.advantage.api import gae as generalized_advantages
from kernels.advantage.api import returns as discounted_returns
from kernels.advantage.group import group_leave_one_out, group_zscore
from kernels.advantage.terms import Advantages, Moments
from rlrag.batch import Batch
from rlrag.metrics import Metrics, Sum
from rlrag.objectives.losses import Estimator, kl_estimate


class Scored(NamedTuple):
    """What credit sees: every model's batch, leaves [M, R, ...], with what prepare scored (old and reference log-probs,
    values) written, and the recipe's coefficients as they stand."""

    batches: Mapping[str, Batch]
    coefficients: Mapping[str, jax.Array]
    num_groups: int  # static capacity
    num_episodes: int  # static capacity


# The batches with `weight` written, and `target` where a critic learns; and metrics.
Credit = Callable[[Scored], tuple[dict[str, Batch], Metrics]]


class Paid(NamedTuple):
    """What the episodes of one model's batch earned: [num_episodes] each."""

    reward: jax.Array
    group: jax.Array
    present: jax.Array  # bool


def per_token(values: jax.Array, batch: Batch) -> jax.Array:
    """Values of segments [M, R, S] at their tokens [M, R, T]."""
    return jnp.take_along_axis(values, batch.segment, axis=-1)


def by_segment(reduce: Callable[..., jax.Array], values: jax.Array, batch: Batch) -> jax.Array:
    """Values of tokens [M, R, T] reduced (a segment_sum or its like) to the segments of their row [M, R, S]."""
    return jax.vmap(jax.vmap(lambda v, s: reduce(v, s, batch.segments.parent.shape[-1])))(values, batch.segment)


def segment_rewards(batch: Batch) -> jax.Array:
    """The summed valid rewards of each segment [M, R, S]."""
    return jnp.sum(jnp.where(batch.segments.valid, batch.segments.rewards, 0.0), -1)


def kl_penalty(scored: Scored, batch: Batch, estimator: Estimator | None) -> jax.Array | float:
    """The part of the reward, -coefficient * KL estimate of old policy and reference, at each trained token [M, R, T];
    0.0 without an estimator (Stiennon et al. 2020, arXiv 2009.01325, section 3.4, given token by token)."""
    if estimator is None:
        return 0.0
    log_ratio = jnp.where(batch.trained > 0, batch.old_logp - batch.ref_logp, 0.0)
    return -scored.coefficients["kl_reward"] * kl_estimate(log_ratio, estimator) * batch.trained


def episode_rewards(batch: Batch, num_episodes: int, penalty: jax.Array | float = 0.0) -> Paid:
    """Reward, group and presence of each trajectory: its calls' summed rewards, averaged over calls; plus the penalty
    [M, R, T] of its tokens, summed.

    A reward paid to every call alike therefore counts once.
    """
    s = batch.segments
    paid = jnp.any(s.valid, -1) & (s.episode >= 0)
    # Segments that are nobody's go to one place past the end and are cut off.
    where = jnp.where(paid, s.episode, num_episodes).reshape(-1)

    def total(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.reshape(-1), where, num_episodes + 1)[:-1]

    calls = total(paid.astype(jnp.float32))
    group = jax.ops.segment_max(s.group.reshape(-1), where, num_episodes + 1)[:-1]
    reward = total(segment_rewards(batch)) / jnp.maximum(calls, 1)
    if isinstance(penalty, jax.Array):
        reward += total(by_segment(jax.ops.segment_sum, penalty, batch))  # row by row first: that needs no other device
    return Paid(reward, jnp.maximum(group, 0), calls > 0)


def token_rewards(batch: Batch, rewards: jax.Array) -> jax.Array:
    """Rewards of segments [M, R, S] at the last trained token of each, 0 at the others; plus tokens' own bonus."""
    T = batch.tokens.shape[-1]
    last = by_segment(jax.ops.segment_max, jnp.where(batch.trained > 0, jnp.arange(T), -1), batch)
    at_last = (per_token(last, batch) == jnp.arange(T)) & (batch.trained > 0)
    return jnp.where(at_last, per_token(rewards, batch), 0.0) + batch.bonus * batch.trained


def whitened(values: jax.Array, mask: jax.Array, moments: Moments, epsilon: float = 1e-8) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) where mask is 1, 0 elsewhere; moments: of these tokens, by row."""
    count, mean, spread = moments.merged()
    return jnp.where(mask > 0, values - mean, 0.0) * jax.lax.rsqrt(spread / jnp.maximum(count, 1) + epsilon)


def of_rows(function: Callable[..., Advantages], *arrays: jax.Array, **options) -> Advantages:
    """A function of rows [B, T] on arrays [M, R, T]."""
    M, R, T = arrays[0].shape
    out = function(*(array.reshape(M * R, T) for array in arrays), **options)
    return jax.tree.map(lambda x: x.reshape(M, R, *x.shape[1:]), out)


# -- kinds of credit --------------------------------------------------------------------------------------------------


def ones() -> Credit:
    """Every trained token counts alike: supervised learning."""

    def credit(scored: Scored) -> tuple[dict[str, Batch], Metrics]:
        return {name: replace(batch, weight=batch.trained) for name, batch in scored.batches.items()}, {}

    return credit


def of_episodes(advantages: Callable[[Paid, int], jax.Array], kl_reward: Estimator | None = None) -> Credit:
    """One number for all tokens of an episode, advantages(paid, num_groups) [num_episodes], plus each token's own
    bonus."""

    def credit(scored: Scored) -> tuple[dict[str, Batch], Metrics]:
        batches, metrics = {}, {}
        for name, batch in scored.batches.items():
            paid = episode_rewards(batch, scored.num_episodes, kl_penalty(scored, batch, kl_reward))
            advantage = advantages(paid, scored.num_groups)
            of_segment = jnp.where(batch.segments.episode >= 0, advantage[jnp.maximum(batch.segments.episode, 0)], 0.0)
            batches[name] = replace(batch, weight=(per_token(of_segment, batch) + batch.bonus) * batch.trained)
            metrics[name] = group_metrics(paid, scored.num_groups) | kl_metrics(batch, kl_reward)
        return batches, named(metrics)

    return credit


def group_relative(divide: bool = True, epsilon: float = 1e-6, kl_reward: Estimator | None = None) -> Credit:
    """The z-score of an episode's reward in its group (GRPO, Shao et al. 2024, section 4.1.2), or its distance from the
    group's mean (divide=False: Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2)."""
    return of_episodes(
        lambda paid, num_groups: group_zscore(*paid, num_groups, divide=divide, epsilon=epsilon), kl_reward
    )


def leave_one_out(kl_reward: Estimator | None = None) -> Credit:
    """An episode's reward less the mean of the others of its group (RLOO, Ahmadian et al. 2024, arXiv 2402.14740,
    section 2.3)."""
    return of_episodes(lambda paid, num_groups: group_leave_one_out(*paid, num_groups), kl_reward)


def rejection(threshold: float = 1.0) -> Credit:
    """1 for episodes whose reward is at least `threshold`, 0 for the others (rejection-sampling fine-tuning, Yuan et
    al. 2023, arXiv 2308.01825, section 3.3, with the sampling done again at every step)."""
    return of_episodes(lambda paid, _: jnp.where(paid.present & (paid.reward >= threshold), 1.0, 0.0))


def returns(
    gamma: float = 1.0, baseline: bool = False, whiten: bool = True, kl_reward: Estimator | None = None
) -> Credit:
    """Discounted rewards to go, KL penalty included, whitened over the batch's tokens (REINFORCE++, Hu 2025, arXiv
    2501.03262, sections 3.1 and 3.2); baseline: less the mean reward of the group first (its baseline variant)."""

    def credit(scored: Scored) -> tuple[dict[str, Batch], Metrics]:
        batches, metrics = {}, {}
        for name, batch in scored.batches.items():
            paid, rewards = episode_rewards(batch, scored.num_episodes), segment_rewards(batch)
            if baseline:
                centred = group_zscore(*paid, scored.num_groups, divide=False)
                mean = (paid.reward - centred)[jnp.maximum(batch.segments.episode, 0)]
                rewards = jnp.where(jnp.any(batch.segments.valid, -1), rewards - mean, 0.0)
            tokens = token_rewards(batch, rewards) + kl_penalty(scored, batch, kl_reward)
            weight, _, moments, _ = of_rows(discounted_returns, tokens, batch.act, batch.segment, gamma=gamma)
            weight = whitened(weight, batch.trained, moments) if whiten else weight
            batches[name] = replace(batch, weight=weight)
            metrics[name] = group_metrics(paid, scored.num_groups) | kl_metrics(batch, kl_reward)
        return batches, named(metrics)

    return credit


def gae(gamma: float = 1.0, lam: float = 1.0, whiten: bool = True, kl_reward: Estimator | None = None) -> Credit:
    """Generalised advantages over action tokens alone (Schulman et al. 2016, equation 16) of a critic's values, and the
    critic's targets, advantage + value; the advantages are then whitened over the batch's tokens."""

    def credit(scored: Scored) -> tuple[dict[str, Batch], Metrics]:
        batches, metrics = {}, {}
        for name, batch in scored.batches.items():
            rewards = token_rewards(batch, segment_rewards(batch)) + kl_penalty(scored, batch, kl_reward)
            weight, target, moments, _ = of_rows(
                generalized_advantages, rewards, batch.value, batch.act, batch.segment, gamma=gamma, lam=lam
            )
            weight = whitened(weight, batch.trained, moments) if whiten else weight
            batches[name] = replace(batch, weight=weight, target=target)
            paid = episode_rewards(batch, scored.num_episodes)
            metrics[name] = group_metrics(paid, scored.num_groups) | kl_metrics(batch, kl_reward)
        return batches, named(metrics)

    return credit


# -- what is reported -------------------------------------------------------------------------------------------------


def group_metrics(paid: Paid, num_groups: int) -> Metrics:
    """The share of groups whose rewards are all equal: relative to each other they say nothing."""
    inside = jnp.where(paid.present, paid.group, num_groups)
    high = jax.ops.segment_max(paid.reward, inside, num_groups + 1)[:-1]
    low = jax.ops.segment_min(paid.reward, inside, num_groups + 1)[:-1]
    there = jax.ops.segment_sum(jnp.ones_like(paid.reward), inside, num_groups + 1)[:-1] > 0
    return {"zero_variance_groups": Sum(jnp.sum(there & (high <= low)).astype(jnp.float32), jnp.sum(there) * 1.0)}


def kl_metrics(batch: Batch, estimator: Estimator | None) -> Metrics:
    """What the penalty is on: the mean estimate of a token."""
    if estimator is None:
        return {}
    log_ratio = jnp.where(batch.trained > 0, batch.old_logp - batch.ref_logp, 0.0)
    return {"kl_reward": Sum(jnp.sum(kl_estimate(log_ratio, estimator) * batch.trained), jnp.sum(batch.trained))}


def named(metrics: Mapping[str, Metrics]) -> Metrics:
    """Metrics of models: of one alone under their own names, of several as MODEL/NAME."""
    if len(metrics) == 1:
        return dict(next(iter(metrics.values())))
    return {f"{model}/{name}": value for model, own in metrics.items() for name, value in own.items()}
