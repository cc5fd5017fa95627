"""Losses: from scores of a micro-batch to sums of (total, count), normalised later by the count of the whole batch.

A loss term is unweighted; the recipe's coefficients (rlrag/objectives/coefficients.py) weigh the terms against each
other, so that what is reported means the same whatever the coefficients.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlrag.batch import Batch
from rlrag.metrics import Least, Metrics, Peak, Sum

Ratio = Literal["token", "sequence"]
Aggregate = Literal["token", "sequence", "constant"]
Importance = Literal["none", "token", "sequence"]
Estimator = Literal["k1", "k2", "k3"]

MAX_TURNS = 8  # metrics by turn: the last of them holds all later turns
LOG_RATIO_BOUND = 20.0  # of sums over a sequence, before exp


class Scores(NamedTuple):
    """What the current parameters say of a micro-batch, [R, T] float32 nats; meaningful where a token is trained.

    logp is of the distribution the sampler drew from: same temperature, renormalised over the same kept set. value is
    what a critic expects of the rest of the segment before the token is chosen, in units of reward; 0 without a head.
    """

    logp: jax.Array
    entropy: jax.Array
    certainty: jax.Array
    value: jax.Array


class Terms(NamedTuple):
    """losses: their means, times the recipe's coefficients, are added up and minimised; counts must not depend on
    scores. metrics: only reported."""

    losses: dict[str, Sum]
    metrics: Metrics


class Objective(NamedTuple):
    """terms, and what prepare has to write into the batch for it: old_logp, ref_logp, value."""

    terms: Callable[[Scores, Batch], Terms]
    needs: frozenset[str] = frozenset()
    recompute_old: bool = False  # score old_logp again with the learner before the first step, sampled tokens too


def masked(values: jax.Array, mask: jax.Array) -> Sum:
    """The sum of values where mask is 1; what stands elsewhere, even nan, does not matter."""
    return Sum(jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask))


def weights(batch: Batch) -> jax.Array:
    """The weight of every trained token, 0 elsewhere: a nan there would get into the gradient as 0 * nan."""
    return jnp.where(batch.trained > 0, batch.weight, 0.0)


# -- sums over the segments of a row ----------------------------------------------------------------------------------


def segment_sum(values: jax.Array, batch: Batch) -> jax.Array:
    """Sums [R, S] of per-token values [R, T] over the trained tokens of each segment."""
    add = partial(jax.ops.segment_sum, num_segments=batch.segments.parent.shape[-1])
    return jax.vmap(add)(jnp.where(batch.trained > 0, values, 0.0), batch.segment)


def segment_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Means over the trained tokens of each segment, at each of its tokens: [R, T]."""
    count = segment_sum(batch.trained, batch)
    return jnp.take_along_axis(segment_sum(values, batch) / jnp.maximum(count, 1), batch.segment, axis=-1)


def aggregated(values: jax.Array, batch: Batch, aggregate: Aggregate, constant_tokens: int = 0) -> Sum:
    """The mean of per-token values over

    token     all trained tokens alike (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.3);
    sequence  sequences, each the mean of its tokens (GRPO, Shao et al. 2024, equation 3: the 1/|o|);
    constant  sequences, each the sum of its tokens / constant_tokens (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
    """
    if aggregate == "token":
        return masked(values, batch.trained)
    count = segment_sum(batch.trained, batch)
    size = jnp.maximum(count, 1) if aggregate == "sequence" else jnp.float32(constant_tokens)
    return Sum(jnp.sum(segment_sum(values, batch) / size), jnp.sum((count > 0).astype(jnp.float32)))


# -- Kullback-Leibler -------------------------------------------------------------------------------------------------


def kl_estimate(log_ratio: jax.Array, estimator: Estimator) -> jax.Array:
    """An estimate of KL(policy || reference) at tokens the policy sampled; log_ratio = log policy - log reference.

    k1 = log_ratio, k2 = log_ratio^2 / 2, k3 = e^(-log_ratio) - 1 + log_ratio (Schulman 2020, "Approximating KL
    divergence"). k1 and k3 have the KL as their mean; k2 is biased but has, as a loss at the sampling policy, the KL's
    gradient, which k3 has only near the reference and k1, whose expected gradient is 0, not at all. As a reward use k1.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.exp(-log_ratio) - 1 + log_ratio


# -- objectives -------------------------------------------------------------------------------------------------------


def nll(weighted_mean: bool = False, num_roles: int = 1) -> Objective:
    """-weight log p(token), a mean over trained tokens; weighted_mean: divided by the sum of their weights instead, so
    that tokens of weight 0 do not count at all (rejection sampling)."""

    def terms(scores: Scores, batch: Batch) -> Terms:
        trained, weight = batch.trained, weights(batch)
        loss = masked(-scores.logp * weight, trained)
        if weighted_mean:
            loss = Sum(loss.total, jnp.sum(weight))
        return Terms({"nll": loss}, watched(scores, batch, num_roles))

    return Objective(terms)


def surrogate(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    ratio: Ratio = "token",
    aggregate: Aggregate = "token",
    constant_tokens: int = 0,
    dual_clip: float = 0.0,
    kl: Estimator | None = None,
    entropy: bool = False,
    recompute_old: bool = False,
    importance: Importance = "none",
    importance_cap: float = 2.0,
    num_roles: int = 1,
) -> Objective:
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (Schulman et al. 2017, equation 7).

    Separate bounds are DAPO's clip-higher (Yu et al. 2025, section 3.1). The ratio r is

    token     policy / old policy of the token;
    sequence  the geometric mean of that over the segment's trained tokens (GSPO, Zheng et al. 2025, arXiv 2507.18071,
              equation 7), the same at each of them.

    dual_clip c > 0: where A < 0, no less than c A (Ye et al. 2020, arXiv 1912.09729, equation 5). kl: a term "kl", the
    estimate of KL(policy || reference). entropy: a term "entropy", the negative entropy. importance: each token's term
    times min(old policy / sampler, importance_cap), of the token or of its whole segment, no gradient through it
    (truncated importance sampling between a sampler and a learner that differ; Espeholt et al. 2018, section 4).
    """
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(f"clip_low is {clip_low}, clip_high {clip_high}: give 0 <= clip_low <= 1 and clip_high >= 0")

    def terms(scores: Scores, batch: Batch) -> Terms:
        trained, advantage = batch.trained, weights(batch)
        log_ratio = jnp.where(trained > 0, scores.logp - batch.old_logp, 0.0)
        r = jnp.exp(segment_mean(log_ratio, batch) if ratio == "sequence" else log_ratio)
        clipped = jnp.clip(r, 1 - clip_low, 1 + clip_high)
        gain = jnp.minimum(r * advantage, clipped * advantage)
        if dual_clip:
            gain = jnp.where(advantage < 0, jnp.maximum(gain, dual_clip * advantage), gain)
        truncated = importance_weights(batch, importance, importance_cap)
        losses = {"surrogate": aggregated(-gain * truncated, batch, aggregate, constant_tokens)}
        metrics: Metrics = watched(scores, batch, num_roles)
        metrics |= {
            "clip_fraction": masked((clipped != r).astype(jnp.float32), trained),
            "clip_fraction_low": masked((r < 1 - clip_low).astype(jnp.float32), trained),
            "clip_fraction_high": masked((r > 1 + clip_high).astype(jnp.float32), trained),
            "ratio": masked(r, trained),
            "ratio_squared": masked(r * r, trained),
            "ratio_max": Peak(jnp.max(jnp.where(trained > 0, r, -jnp.inf))),
            "ratio_min": Least(jnp.min(jnp.where(trained > 0, r, jnp.inf))),
        }
        if importance != "none":
            metrics["importance"] = masked(truncated, trained)
        if kl:
            distance = kl_estimate(jnp.where(trained > 0, scores.logp - batch.ref_logp, 0.0), kl)
            losses["kl"] = aggregated(distance, batch, aggregate, constant_tokens)
            metrics["kl"] = masked(distance, trained)
        if entropy:
            losses["entropy"] = aggregated(-scores.entropy, batch, aggregate, constant_tokens)
        return Terms(losses, metrics)

    needs = {"old_logp"} | ({"ref_logp"} if kl else set())
    return Objective(terms, frozenset(needs), recompute_old)


def importance_weights(batch: Batch, importance: Importance, cap: float) -> jax.Array:
    """min(old policy / sampler, cap) [R, T]; 1 at tokens the sampler did not choose."""
    log_weight = jnp.where(batch.sampled > 0, batch.old_logp - batch.logp, 0.0)
    if importance == "none":
        return jnp.ones_like(log_weight)
    if importance == "sequence":
        total = segment_sum(log_weight, batch)
        log_weight = jnp.take_along_axis(total, batch.segment, axis=-1)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.minimum(log_weight, LOG_RATIO_BOUND)), cap))


def value(clip: float = 0.2) -> Objective:
    """A critic's loss, 1/2 max((V - target)^2, (V_clipped - target)^2), V_clipped within `clip` of the value at the
    start of the update (PPO's reference implementation; 0: not clipped), a mean over trained tokens."""

    def terms(scores: Scores, batch: Batch) -> Terms:
        trained = batch.trained
        v, old, target = (jnp.where(trained > 0, x, 0.0) for x in (scores.value, batch.value, batch.target))
        error = jnp.square(v - target)
        if clip:
            error = jnp.maximum(error, jnp.square(old + jnp.clip(v - old, -clip, clip) - target))
        metrics: Metrics = {
            "value": masked(v, trained),
            "value_target": masked(target, trained),
            "value_target_squared": masked(target * target, trained),
            "value_error_squared": masked(jnp.square(old - target), trained),  # before the update: honest
        }
        if clip:
            metrics["value_clip_fraction"] = masked((jnp.abs(v - old) > clip).astype(jnp.float32), trained)
        return Terms({"value": masked(0.5 * error, trained)}, metrics)

    return Objective(terms, frozenset({"value"}))


def joined(*objectives: Objective) -> Objective:
    """Several objectives of one model: their terms and metrics side by side, their names must differ."""

    def terms(scores: Scores, batch: Batch) -> Terms:
        losses, metrics = {}, {}
        for objective in objectives:
            new = objective.terms(scores, batch)
            assert not losses.keys() & new.losses.keys(), f"two objectives have a loss {losses.keys() & new.losses}"
            losses, metrics = losses | new.losses, metrics | new.metrics
        return Terms(losses, metrics)

    needs = frozenset().union(*(objective.needs for objective in objectives))
    return Objective(terms, needs, any(objective.recompute_old for objective in objectives))


def watched(scores: Scores, batch: Batch, num_roles: int) -> Metrics:
    """What shows a collapse before the reward does: entropy, by role too; certainty; the distance between what the
    sampler recorded and what the learner says of the same tokens, by turn too; the log-prob of episodes that earned
    something (it falls when good episodes are unlearned)."""
    trained, sampled = batch.trained, batch.sampled
    gap = jnp.where(sampled > 0, jnp.abs(scores.logp - batch.logp), 0.0)
    segments = batch.segments
    earned = jnp.sum(jnp.where(segments.valid, segments.rewards, 0.0), -1) > 0
    correct = jnp.take_along_axis(earned, batch.segment, axis=-1) * trained
    return {
        "entropy": masked(scores.entropy, trained),
        "entropy_by_role": by_index(scores.entropy, trained, batch.role, num_roles),
        "certainty": masked(scores.certainty, trained),
        "correct_logp": masked(scores.logp, correct),
        "sampler_learner_gap": masked(gap, sampled),
        "sampler_learner_gap_by_turn": by_index(gap, sampled, jnp.minimum(batch.turn, MAX_TURNS - 1), MAX_TURNS),
        "sampler_learner_gap_max": Peak(jnp.max(gap)),
    }


def by_index(values: jax.Array, mask: jax.Array, index: jax.Array, size: int) -> Sum:
    """Means of values for every index: a Sum of [size]."""
    add = partial(jax.ops.segment_sum, segment_ids=index.reshape(-1), num_segments=size)
    return Sum(add(jnp.where(mask > 0, values, 0.0).reshape(-1)), add(mask.reshape(-1)))
