"""Losses: from scores of a micro-batch to sums of (total, count), normalised later by the count of the whole batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlrag.batch import Batch
from rlrag.metrics import Metrics, Peak, Sum


class Scores(NamedTuple):
    """What the current parameters say of a micro-batch, [R, T] float32 nats; meaningful where a token is trained.

    logp is of the distribution the sampler drew from: same temperature, renormalised over the same kept set.
    """

    logp: jax.Array
    entropy: jax.Array
    certainty: jax.Array


class Terms(NamedTuple):
    """losses: their means are added up and minimised; counts must not depend on scores. metrics: only reported."""

    losses: dict[str, Sum]
    metrics: Metrics


class Objective(NamedTuple):
    terms: Callable[[Scores, Batch], Terms]
    needs_reference: bool = False
    needs_old: bool = False
    recompute_old: bool = False  # score old_logp again with the learner before the first step, sampled tokens too


def masked(values: jax.Array, mask: jax.Array) -> Sum:
    """The sum of values where mask is 1; what stands elsewhere, even nan, does not matter."""
    return Sum(jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask))


def weights(batch: Batch) -> jax.Array:
    """The weight of every trained token, 0 elsewhere: a nan there would get into the gradient as 0 * nan."""
    return jnp.where(batch.trained > 0, batch.weight, 0.0)


def nll() -> Objective:
    """-weight log p(token), a mean over trained tokens."""

    def terms(scores: Scores, batch: Batch) -> Terms:
        trained = batch.trained
        losses = {"nll": masked(-scores.logp * weights(batch), trained)}
        return Terms(losses, {"entropy": masked(scores.entropy, trained)})

    return Objective(terms)


def surrogate(clip_low: float = 0.2, clip_high: float = 0.2, kl: float = 0.0, recompute_old: bool = False) -> Objective:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7) with separate bounds, a mean over trained tokens,
    plus kl times the k3 estimate of KL(policy || reference), e^d - d - 1 with d = ref - logp (Schulman 2020; GRPO,
    Shao et al. 2024, equation 4)."""
    if not 0 <= clip_low < 1 or clip_high < 0 or kl < 0:
        raise ValueError(
            f"clip_low is {clip_low}, clip_high {clip_high}, kl {kl}: give 0 <= clip_low < 1, clip_high >= 0, kl >= 0"
        )

    def terms(scores: Scores, batch: Batch) -> Terms:
        trained, advantage = batch.trained, weights(batch)
        log_ratio = jnp.where(trained > 0, scores.logp - batch.old_logp, 0.0)
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        losses = {"surrogate": masked(-jnp.minimum(ratio * advantage, clipped * advantage), trained)}
        sampled = batch.sampled
        gap = jnp.where(sampled > 0, jnp.abs(scores.logp - batch.logp), 0.0)
        metrics: Metrics = {
            "clip_fraction": masked((clipped != ratio).astype(jnp.float32), trained),
            "ratio": masked(ratio, trained),
            "ratio_max": Peak(jnp.max(ratio)),
            "entropy": masked(scores.entropy, trained),
            "certainty": masked(scores.certainty, trained),
            "sampler_learner_gap": masked(gap, sampled),
            "sampler_learner_gap_max": Peak(jnp.max(gap)),
        }
        if kl:
            distance = jnp.where(trained > 0, batch.ref_logp - scores.logp, 0.0)
            k3 = jnp.exp(distance) - distance - 1
            losses["kl"] = Sum(kl * masked(k3, trained).total, jnp.sum(trained))
            metrics["kl"] = masked(k3, trained)
        return Terms(losses, metrics)

    return Objective(terms, needs_reference=kl > 0, needs_old=True, recompute_old=recompute_old)
