"""The five-sum monoid over a vocabulary, from which every per-token statistic and its gradient follow.

For a row of logits z (already divided by the temperature) keep, over any subset of the vocabulary,

    m = max z    l = sum e^(z-m)    a = sum (z-m) e^(z-m)    s = sum (z-m)    t_k = z[id_k]

and the number n of logits in the subset. Two disjoint subsets combine by moving both to the larger m, so
the same ``combine`` merges vocabulary blocks, vocabulary shards and kernel tiles. With all of V seen,

    lse       = m + log l                              nats
    entropy   = lse - sum z p   = log l - a / l        nats
    certainty = KL(uniform || p) = lse - (sum z)/n - log n = log l - s / n - log n
                (self-certainty: Kang et al. 2025, arXiv 2502.18581)
    log p_k   = t_k - lse

and the gradient needs only lse and entropy (H) from the forward pass:

    dz = (g_lse + g_H (-(log p + H)) + g_certainty) p - g_certainty / n + sum_k g_k 1[z is t_k]

``a`` and ``s`` are kept relative to m, not as sum z e^(z-m) and sum z: in float32 a common offset of 1e4 in the
logits would otherwise leave an error of about 1e-3 in entropy and certainty (the offset would cancel after rounding).

A logit of -inf means "not in the vocabulary of this row": it takes no part in n, has p = 0 and gradient 0.
A row with nothing in it gives lse = -inf and entropy = certainty = 0, never NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class TokenStats(NamedTuple):
    """What a distribution over the vocabulary says about each token; float32, nats."""

    lse: Array  # [...] log of the sum of exp of the logits
    entropy: Array  # [...]
    certainty: Array  # [...] KL(uniform || p)
    logits: Array  # [..., K] wanted logits, divided by the temperature; -inf where the id names no logit


class TokenSums(NamedTuple):
    """The five sums (and the count they range over) of a subset of the vocabulary; float32."""

    maximum: Array  # [...] m
    exponentials: Array  # [...] l
    weighted: Array  # [...] a
    shifted: Array  # [...] s
    count: Array  # [...] n, exact up to 2^24
    logits: Array  # [..., K] t, -inf where the id lies outside the subset


def inverse_temperature(temperature: Array | float) -> Array:
    """1/temperature in float32; 1 where the temperature is 0 (greedy), whose distribution is reported at 1."""
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.where(temperature > 0, 1 / jnp.where(temperature > 0, temperature, 1), 1)


def empty(shape: tuple[int, ...], num_wanted: int) -> TokenSums:
    """The identity of ``combine`` for rows of the given shape."""
    zeros, none = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    return TokenSums(none, zeros, zeros, zeros, zeros, jnp.full((*shape, num_wanted), -jnp.inf, jnp.float32))


def partial(logits: Array, ids: Array, *, start: Array | int = 0, masked: bool = True) -> TokenSums:
    """The sums of one block of the vocabulary.

    Args:
      logits: [..., W] float; columns are the vocabulary entries start ... start + W - 1.
      ids: [..., K] int; an id outside the block (so any negative one) gives -inf.
      start: first vocabulary entry of the block.
      masked: whether -inf logits may occur; False saves the passes that look for them.
    """
    logits = logits.astype(jnp.float32)
    maximum = logits.max(-1)
    # XLA for CPU writes any [..., W] value that two reductions share to memory (3x the time at W = 4096). Three
    # names for one offset keep the three chains apart, so that each reduction reads the logits and nothing else.
    offset = jnp.where(maximum == -jnp.inf, 0, maximum)
    offset_weighted = lax.optimization_barrier(offset)
    offset_shifted = lax.optimization_barrier(offset_weighted)
    exponentials = jnp.exp(logits - offset[..., None]).sum(-1)
    # The floor turns -inf * e^-inf (NaN) into -1e30 * 0.
    floored = jnp.maximum(logits - offset_weighted[..., None], -1e30)
    weighted = (floored * jnp.exp(floored)).sum(-1)
    if masked:
        present = logits > -jnp.inf
        shifted = jnp.where(present, logits - offset_shifted[..., None], 0).sum(-1)
        count = present.sum(-1, dtype=jnp.float32)
    else:
        shifted = (logits - offset_shifted[..., None]).sum(-1)
        count = jnp.full(maximum.shape, logits.shape[-1], jnp.float32)
    return TokenSums(maximum, exponentials, weighted, shifted, count, _take(logits, ids - start))


def _take(logits: Array, ids: Array) -> Array:
    width = logits.shape[-1]
    inside = (ids >= 0) & (ids < width)
    return jnp.where(inside, jnp.take_along_axis(logits, jnp.clip(ids, 0, width - 1), axis=-1), -jnp.inf)


def combine(left: TokenSums, right: TokenSums) -> TokenSums:
    """The sums of the union of two disjoint subsets; associative, commutative, with ``empty`` as identity."""
    maximum = jnp.maximum(left.maximum, right.maximum)
    parts = [_rebase(part, maximum) for part in (left, right)]
    exponentials, weighted, shifted = (sum_left + sum_right for sum_left, sum_right in zip(*parts))
    logits = jnp.maximum(left.logits, right.logits)  # an id lies in at most one subset, the other holds -inf
    return TokenSums(maximum, exponentials, weighted, shifted, left.count + right.count, logits)


def combine_along(sums: TokenSums, axis: int = 0) -> TokenSums:
    """The sums of the union of disjoint subsets that lie along an axis of every field."""
    largest, total = functools.partial(jnp.max, axis=axis), functools.partial(jnp.sum, axis=axis)
    return _combine_all(sums, largest(sums.maximum), largest, total)


def combine_devices(sums: TokenSums, axis: str) -> TokenSums:
    """Inside a shard_map: the sums of the union of the disjoint subsets of the devices along a mesh axis."""
    largest, total = functools.partial(lax.pmax, axis_name=axis), functools.partial(lax.psum, axis_name=axis)
    return _combine_all(sums, largest(sums.maximum), largest, total)


def _combine_all(sums: TokenSums, maximum: Array, largest: Callable, total: Callable) -> TokenSums:
    exponentials, weighted, shifted = (total(part) for part in _rebase(sums, maximum))
    return TokenSums(maximum, exponentials, weighted, shifted, total(sums.count), largest(sums.logits))


def _rebase(sums: TokenSums, maximum: Array) -> tuple[Array, Array, Array]:
    """(l, a, s) relative to a larger maximum; an empty part (m = -inf, all sums 0) stays 0."""
    delta = jnp.where(sums.maximum == -jnp.inf, 0, sums.maximum - maximum)
    scale = jnp.exp(delta)
    weighted = scale * (sums.weighted + delta * sums.exponentials)
    return scale * sums.exponentials, weighted, sums.shifted + sums.count * delta


def finish(sums: TokenSums) -> TokenStats:
    """The statistics of rows of which the whole vocabulary has been seen."""
    seen = sums.count > 0
    exponentials, count = jnp.where(seen, sums.exponentials, 1), jnp.where(seen, sums.count, 1)
    log_exponentials = jnp.log(exponentials)
    entropy = log_exponentials - sums.weighted / exponentials
    certainty = log_exponentials - sums.shifted / count - jnp.log(count)
    return TokenStats(sums.maximum + log_exponentials, entropy, certainty, sums.logits)


def sums_of(stats: TokenStats, count: int) -> TokenSums:
    """What ``finish`` made of ``count`` logits taken back, relative to lse instead of the largest logit: l = 1.

    Any offset that is not below the largest logit serves ``combine``, and finished statistics are so enough to merge.
    """
    shifted = -count * (stats.certainty + math.log(count))
    counts = jnp.full_like(stats.lse, count)
    return TokenSums(stats.lse, jnp.ones_like(stats.lse), -stats.entropy, shifted, counts, stats.logits)


def gradient(
    logits: Array,
    ids: Array,
    lse: Array,
    entropy: Array,
    cotangent: TokenStats,
    *,
    count: Array | int | None = None,
    start: Array | int = 0,
    masked: bool = True,
) -> Array:
    """The gradient with respect to one block of logits, [..., W] float32.

    Args:
      logits: [..., W], the block that starts at vocabulary entry ``start``.
      ids: [..., K]; ids outside the block receive nothing.
      lse, entropy: [...] of the whole row, saved from the forward pass.
      cotangent: of the four statistics.
      count: how many logits the whole row has; None when the block is the whole row.
      masked: whether -inf logits may occur, as in ``partial``.
    """
    logits = logits.astype(jnp.float32)
    present = logits > -jnp.inf if masked else None
    if count is None:
        count = logits.shape[-1] if present is None else jnp.maximum(present.sum(-1, dtype=jnp.float32), 1)
    log_p = logits - lse[..., None]
    if present is not None:
        log_p = jnp.where(present, log_p, 0)
    scale = cotangent.lse + cotangent.certainty - cotangent.entropy * entropy
    dense = jnp.exp(log_p) * (scale[..., None] - cotangent.entropy[..., None] * log_p)
    dense = dense - (cotangent.certainty / count)[..., None]
    if present is not None:
        dense = jnp.where(present, dense, 0)
    return _add_at(dense, ids - start, cotangent.logits, logits)


def _add_at(dense: Array, ids: Array, updates: Array, logits: Array) -> Array:
    """dense[..., ids] += updates where the id is inside the block and its logit is not masked."""
    width, num_wanted = dense.shape[-1], ids.shape[-1]
    wanted = (ids >= 0) & (ids < width) & (_take(logits, ids) > -jnp.inf)
    columns = jnp.where(wanted, ids, width).reshape(-1, num_wanted)  # out of range: dropped
    # vmap makes the row a batching dimension of the scatter. With explicit row indices the partitioner would gather the
    # indices of all data shards on every device.
    add = jax.vmap(lambda row, at, update: row.at[at].add(update, mode="drop"))
    return add(dense.reshape(-1, width), columns, updates.reshape(-1, num_wanted)).reshape(dense.shape)


def filtered_log_prob(logits: Array, lse: Array, kept: Array) -> Array:
    """Log-prob of a token under the distribution renormalised over its kept set, [...] nats.

    The one definition that sampler and learner share: equal logits give equal log-probs.

    Args:
      logits: [...] logit of the token, which is a member of its kept set.
      lse: [...] of the whole row, used where nothing is kept (an unfiltered row).
      kept: [..., K] logits of the kept set, distinct ids; -inf marks unused places. K may be 0.
    """
    if kept.shape[-1] == 0:
        return logits - lse
    largest = lax.stop_gradient(kept.max(-1))
    filtered = largest > -jnp.inf
    # Rows without a kept set go through finite numbers, so that their gradient is 0 and not NaN.
    maximum = jnp.where(filtered, largest, 0)
    exponentials = jnp.exp(kept - maximum[..., None]).sum(-1)
    kept_lse = maximum + jnp.log(jnp.where(filtered, exponentials, 1))
    return logits - jnp.where(filtered, kept_lse, lse)
