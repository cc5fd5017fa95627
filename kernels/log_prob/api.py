"""Token statistics of hidden states under a vocabulary head: one differentiable operation, several implementations.

    z = hidden @ head^T / temperature;   lse, entropy, certainty = KL(uniform || softmax z), z[ids]

The logits of all tokens are never kept: the residuals are lse and entropy (two numbers a token) beside the inputs,
and the backward pass computes the logits again (``kernels.token_stats`` has the equations). Per-token vectors come
back, not losses: every objective is built on them.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import token_stats as monoid
from kernels.dispatch import Implementation
from kernels.log_prob import chunked, leading, reference
from kernels.token_stats import TokenStats

Array = jax.Array

# In order of preference. Accelerator kernels go in front of "chunked" where their measured table says so.
IMPLEMENTATIONS = {"chunked": Implementation(chunked), "reference": Implementation(reference)}

# Float32 logits of one chunk. CPU: 8 MiB stay in cache (forward + backward of 4,096 tokens, D = 256, V = 4,096 on two
# cores: 151 ms with 8 MiB, 200 ms with 1 MiB, 174 ms in one chunk of 64 MiB). Accelerators: about 4,096 tokens of a
# 128k vocabulary, where a plain product runs at full speed.
CHUNK_BYTES = {"cpu": 2**23}
CHUNK_BYTES_DEFAULT = 2**31
# Every chunk reads and writes the gradient of the head once, work that must stay small beside its products.
CHUNK_TOKENS_LEAST = 512


class _Plan(NamedTuple):
    """The static part of a call."""

    choice: dispatch.Choice
    chunk: int  # columns of T


def token_stats(
    hidden: Array,
    head: Array,
    ids: Array,
    *,
    temperature: Array | float | None = None,
    implementation: str | None = None,
    chunk_tokens: int | None = None,
    num_devices: int = 1,
    count: Array | None = None,
) -> TokenStats:
    """lse, entropy, certainty [...] and logits [..., K] of softmax(hidden @ head^T / temperature); nats, float32.

    Differentiable with respect to hidden and head, once, in reverse mode; temperature receives no gradient.

    Args:
      hidden: [B, T, D], or [..., D] with at least one token axis. The axis before D is the one that is cut into chunks,
        so it must not be sharded; shard the others.
      head: [V, D], the layout of a tied embedding and of published checkpoints, so that neither is ever transposed.
      ids: [..., K] int, K >= 1 vocabulary entries a token; one outside 0 ... V-1 (use -1) means none: its logit is -inf
        and it receives no gradient.
      temperature: [...] or a number; None is 1. Where it is 0 (greedy) the distribution is that at 1.
      implementation: a name, or None for the best on this platform.
      chunk_tokens: most tokens (B * T) whose logits are held at once; None derives it from a memory budget a device.
      num_devices: over which B and V are sharded. Each has a budget of its own: chunks are as many times larger, and
        the gradient of a head that lies over several of them is summed as many times less often.
      count: [] int32; columns of T from here on are not wanted: nothing is computed for them (but up to the end of a
        chunk), their statistics are 0 or meaningless, and cotangents given to them must be 0. None: all are wanted.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    _check(hidden, head, ids)
    choice = dispatch.choose(
        "log_prob",
        IMPLEMENTATIONS,
        implementation,
        tokens=math.prod(hidden.shape[:-1]),
        hidden=hidden.shape[-1],
        vocabulary=head.shape[0],
    )
    shape = hidden.shape[:-1]
    as_rows = functools.partial(_as_rows, shape)
    scale = None
    if temperature is not None:
        scale = as_rows(jnp.broadcast_to(monoid.inverse_temperature(temperature), shape))
    hidden, ids = as_rows(hidden), as_rows(ids)
    rows, tokens, _ = hidden.shape
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS_LEAST, num_devices * _chunk_bytes() // (4 * head.shape[0]))
    chunk = chunked.chunk_length(tokens, chunk_tokens // max(1, rows))
    stats = _token_stats(_Plan(choice, chunk), hidden, head, ids, scale, count)
    return jax.tree.map(lambda each: each.reshape(*shape, *each.shape[2:]), stats)


def log_prob(
    hidden: Array,
    head: Array,
    token: Array,
    *,
    kept: Array | None = None,
    temperature: Array | float | None = None,
    implementation: str | None = None,
    chunk_tokens: int | None = None,
) -> Array:
    """Log-prob of each token, [...] nats; renormalised over its kept set where it has one.

    Args:
      token: [...] int.
      kept: [..., K] distinct ids the sampler could choose from, -1 for unused places; a token whose places are all
        unused was sampled from the whole vocabulary. None: nothing was filtered.
      hidden, head, temperature, implementation, chunk_tokens: as in ``token_stats``.
    """
    ids = token[..., None] if kept is None else jnp.concatenate([token[..., None], kept], axis=-1)
    stats = token_stats(
        hidden, head, ids, temperature=temperature, implementation=implementation, chunk_tokens=chunk_tokens
    )
    return monoid.filtered_log_prob(stats.logits[..., 0], stats.lse, stats.logits[..., 1:])


def _check(hidden: Array, head: Array, ids: Array) -> None:
    if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[-1]:
        raise ValueError(f"hidden [..., T, D] and head [V, D] must share D, got {hidden.shape} and {head.shape}")
    if ids.shape[:-1] != hidden.shape[:-1] or ids.ndim != hidden.ndim or ids.shape[-1] < 1:
        raise ValueError(f"ids must be {(*hidden.shape[:-1], 'K >= 1')} for hidden {hidden.shape}, got {ids.shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")


def _as_rows(shape: tuple[int, ...], array: Array) -> Array:
    """[..., T, *rest] -> [B, T, *rest]; a single token axis becomes one row."""
    rest = array.shape[len(shape) :]
    return array.reshape(-1, shape[-1], *rest)


def _chunk_bytes() -> int:
    return CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES_DEFAULT)


def _statistics(
    plan: _Plan, hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None
) -> TokenStats:
    def forward(module: ModuleType) -> Callable[..., TokenStats]:
        if count is not None:
            return functools.partial(leading.forward, module.forward, count, plan.chunk)
        return functools.partial(module.forward, chunk=plan.chunk)

    return dispatch.call(IMPLEMENTATIONS, plan.choice, forward, hidden, head, ids, scale)


def _forward(
    plan: _Plan, hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None
) -> tuple[TokenStats, tuple]:
    stats = _statistics(plan, hidden, head, ids, scale, count)
    return stats, (hidden, head, ids, scale, stats.lse, stats.entropy, count)


def _backward(plan: _Plan, residuals: tuple, cotangent: TokenStats) -> tuple[Array, Array, None, None, None]:
    *inputs, count = residuals
    hidden, head, *_ = inputs

    def backward(module: ModuleType) -> Callable[..., tuple[Array, Array]]:
        if count is not None:
            return functools.partial(leading.backward, module.backward, count, plan.chunk)
        return functools.partial(module.backward, chunk=plan.chunk)

    grad_hidden, grad_head = dispatch.call(IMPLEMENTATIONS, plan.choice, backward, *inputs, cotangent)
    return grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype), None, None, None


_token_stats = jax.custom_vjp(_statistics, nondiff_argnums=(0,))
_token_stats.defvjp(_forward, _backward)
