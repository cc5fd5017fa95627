"""A sampled token a row and what the sampler reports about it, from one read of the decode logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels import token_stats as monoid
from kernels.dispatch import Implementation
from kernels.uncertainty import blocked, mosaic_gpu, mosaic_tpu, reference
from kernels.uncertainty.filters import Filters, keep
from kernels.uncertainty.reference import first_above

Array = jax.Array

# In order of preference. The kernels are chosen by name until a table measured on their hardware says that they win.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.draw, platforms=("cuda",), automatic=(), refuses=mosaic_gpu.refuses),
    "mosaic_tpu": Implementation(mosaic_tpu.draw, platforms=("tpu",), automatic=(), refuses=mosaic_tpu.refuses),
    "blocked": Implementation(blocked.draw),
    "reference": Implementation(reference.draw),
}


class Sampled(NamedTuple):
    """One token a row; float32 but the ids."""

    token: Array  # int32 [B]
    kept: Array  # int32 [B, K] the ids it could have been, -1 = unused place; a row of -1: the whole vocabulary
    log_prob: Array  # [B] nats, under the distribution actually sampled: filtered to the kept set where there is one
    entropy: Array  # [B] nats, of the whole distribution at the temperature
    certainty: Array  # [B] nats, KL(uniform || p) of the same
    margin: Array  # [B] p_1 - p_2 of the same, the two largest probabilities


def sample(
    logits: Array,
    uniform: Array,
    temperature: Array,
    filters: Filters,
    *,
    masked: bool = True,
    implementation: str | None = None,
) -> Sampled:
    """One token a row by inverse CDF; its log-prob, and entropy, self-certainty and margin of softmax(logits / T).

    The token is the one with the smallest id (in a filtered set: the best) whose cumulative probability exceeds
    ``uniform``: it depends on the row's logits and its number alone, never on other rows, and implementations differ by
    the rounding of the sums at most. Margin is that of margin sampling (Scheffer et al. 2001): the difference of the
    two largest probabilities, 0 for a tie and 1 where only one token is possible. Log-prob is computed by
    ``token_stats.filtered_log_prob``, which the learner uses too. Not differentiable by contract: it describes samples.

    Unfiltered rows are drawn by the implementation in its one read. Where a batch has any filtered row, the K best
    candidates are found by a second read (``filters.largest``), which batches without one do not pay.

    Args:
      logits: [B, V] before the temperature; -inf is outside the vocabulary of the row.
      uniform: [B] float32 in [0, 1).
      temperature: [B]; 0 is greedy, takes the first of the largest logits, and is reported at temperature 1.
      filters: the K of its allowed ids caps filtered sets; with K = 0 nothing can be filtered.
      masked: whether -inf logits may occur. A sampler that lists its allowed ids in ``filters`` passes False and saves
        the passes that look for them; a -inf logit then counts as a vocabulary entry, which makes certainty infinite.
      implementation: a name, or None for the best on this platform.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    shapes = [logits.shape[:1], uniform.shape, temperature.shape, *(each.shape[:1] for each in filters)]
    if logits.ndim != 2 or filters.allowed.ndim != 2 or len(set(shapes)) > 1:
        given = ", ".join(str(each.shape) for each in (logits, uniform, temperature, *filters))
        raise ValueError(f"logits [B, V], uniform, temperature, top_k, top_p [B], allowed [B, K]: B differs in {given}")
    choice = dispatch.choose(
        "uncertainty", IMPLEMENTATIONS, implementation, rows=logits.shape[0], vocabulary=logits.shape[1]
    )
    scale, greedy = monoid.inverse_temperature(temperature), temperature == 0
    arguments = logits, uniform.astype(jnp.float32), scale, greedy
    drawn = dispatch.call(IMPLEMENTATIONS, choice, lambda run: functools.partial(run, masked=masked), *arguments)
    token, logit = drawn.token, drawn.logit
    kept = jnp.full(filters.allowed.shape, -1, jnp.int32)
    values = jnp.full(filters.allowed.shape, -jnp.inf)
    if filters.allowed.shape[1]:
        filtered = filters.filtered()

        def within() -> tuple[Array, Array, Array, Array]:
            ids, values = keep(logits, scale, drawn.lse, filters)
            largest = jnp.maximum(values.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
            place, _ = first_above(jnp.exp(values - largest), uniform)
            place = jnp.where(greedy, 0, place)[:, None]  # best first
            chosen, its_logit = (jnp.take_along_axis(each, place, -1)[:, 0] for each in (ids, values))
            ids, values = jnp.where(filtered[:, None], ids, kept), jnp.where(filtered[:, None], values, -jnp.inf)
            return jnp.where(filtered, chosen, token), jnp.where(filtered, its_logit, logit), ids, values

        token, logit, kept, values = lax.cond(jnp.any(filtered), within, lambda: (token, logit, kept, values))
    log_prob = monoid.filtered_log_prob(logit, drawn.lse, values)
    first, second = (jnp.exp(each - drawn.lse) for each in (drawn.first, drawn.second))
    margin = jnp.where(drawn.lse > -jnp.inf, first - second, 0)
    return Sampled(token, kept, log_prob, drawn.entropy, drawn.certainty, margin)
