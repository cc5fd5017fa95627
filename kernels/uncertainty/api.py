"""What the sampler reports about every token it draws, from one read of the decode logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import token_stats as monoid
from kernels.dispatch import Implementation
from kernels.uncertainty import blocked, reference

Array = jax.Array

# In order of preference.
IMPLEMENTATIONS = {
    "blocked": Implementation(blocked.statistics),
    "reference": Implementation(reference.statistics),
}


class Uncertainty(NamedTuple):
    """Of one sampled token a row; float32."""

    log_prob: Array  # [B] nats, under the distribution actually sampled: filtered to the kept set where there is one
    entropy: Array  # [B] nats, of the whole distribution at the temperature
    certainty: Array  # [B] nats, KL(uniform || p) of the same
    margin: Array  # [B] p_1 - p_2 of the same, the two largest probabilities


def uncertainty(
    logits: Array,
    sampled: Array,
    temperature: Array,
    kept: Array,
    *,
    masked: bool = True,
    implementation: str | None = None,
) -> Uncertainty:
    """log-prob of the sampled tokens, and entropy, self-certainty and margin of softmax(logits / temperature).

    Margin is that of margin sampling (Scheffer et al. 2001): the difference of the two largest probabilities, 0 for a
    tie and 1 where only one token is possible. Log-prob is computed by ``token_stats.filtered_log_prob``, which the
    learner uses too. Not differentiable by contract: it describes samples.

    Args:
      logits: [B, V] before the temperature; -inf is outside the vocabulary of the row (an allowed-token mask).
      sampled: [B] int, a member of the row's kept set where it has one.
      temperature: [B]; 0 (greedy) is reported at temperature 1.
      kept: [B, K] distinct ids the sampler could choose from, -1 for unused places; a row of -1 is unfiltered.
        K may be 0.
      masked: whether -inf logits may occur. A sampler that lists its allowed ids in ``kept`` passes False and saves a
        fifth of the time; a -inf logit then counts as a vocabulary entry, which makes certainty infinite.
      implementation: a name, or None for the best on this platform.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    if logits.ndim != 2 or sampled.shape != logits.shape[:1] or kept.ndim != 2 or kept.shape[:1] != logits.shape[:1]:
        shapes = f"{logits.shape}, {sampled.shape} and {kept.shape}"
        raise ValueError(f"logits [B, V], sampled [B] and kept [B, K] must share B, got {shapes}")
    choice = dispatch.choose(
        "uncertainty", IMPLEMENTATIONS, implementation, rows=logits.shape[0], vocabulary=logits.shape[1]
    )
    scale = jnp.broadcast_to(monoid.inverse_temperature(temperature), sampled.shape)
    ids = jnp.concatenate([sampled[:, None], kept.astype(sampled.dtype)], axis=1)
    stats, first, second = dispatch.call(
        IMPLEMENTATIONS, choice, lambda run: functools.partial(run, masked=masked), logits, ids, scale
    )
    log_prob = monoid.filtered_log_prob(stats.logits[:, 0], stats.lse, stats.logits[:, 1:])
    margin = jnp.where(stats.lse > -jnp.inf, jnp.exp(first - stats.lse) - jnp.exp(second - stats.lse), 0)
    return Uncertainty(log_prob, stats.entropy, stats.certainty, margin)
