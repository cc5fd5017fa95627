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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels import dispatch
from kernels import token_stats as monoid
from kernels.dispatch import Implementation
from kernels.log_prob import chunked, leading, mosaic_gpu, mosaic_tpu, reference, vocabulary_parallel
from kernels.log_prob.vocabulary_parallel import Shards
from kernels.token_stats import TokenStats

Array = jax.Array

# In order of preference. An accelerator kernel is chosen by itself where a measured table says that it wins.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu, platforms=("cuda",), automatic=(), refuses=mosaic_gpu.refuses),
    "mosaic_tpu": Implementation(mosaic_tpu, platforms=("tpu",), automatic=(), refuses=mosaic_tpu.refuses),
    "chunked": Implementation(chunked),
    "reference": Implementation(reference),
}

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
    shards: Shards | None


def token_stats(
    hidden: Array,
    head: Array,
    ids: Array,
    *,
    temperature: Array | float | None = None,
    implementation: str | None = None,
    chunk_tokens: int | None = None,
    count: Array | None = None,
    shards: Shards | None = None,
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
      chunk_tokens: most tokens (B * T) whose logits a device holds at once; None derives it from a memory budget.
      count: [] int32; columns of T from here on are not wanted: nothing is computed for them (but up to the end of a
        chunk), their statistics are 0 or meaningless, and cotangents given to them must be 0. None: all are wanted.
      shards: how B and V lie over a mesh, for which any implementation then runs on what each device holds
        (``vocabulary_parallel``). None: on one device, or, where the compiler can partition it ("chunked"), as it may.

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
        dtype=hidden.dtype,
    )
    shape = hidden.shape[:-1]
    as_rows = functools.partial(_as_rows, shape)
    scale = None
    if temperature is not None:
        scale = as_rows(jnp.broadcast_to(monoid.inverse_temperature(temperature), shape))
    hidden, ids = as_rows(hidden), as_rows(ids)
    rows, vocabulary = hidden.shape[0], head.shape[0]
    if shards is not None:
        rows, vocabulary = shards.local(rows, vocabulary)
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS_LEAST, _chunk_bytes() // (4 * vocabulary))
    chunk = chunked.chunk_length(hidden.shape[1], chunk_tokens // max(1, rows))
    stats = _token_stats(_Plan(choice, chunk, shards), hidden, head, ids, scale, count)
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
        def run(hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None) -> TokenStats:
            if count is None:
                return module.forward(hidden, head, ids, scale, chunk=plan.chunk)
            return leading.forward(module.forward, count, plan.chunk, hidden, head, ids, scale)

        return run

    run: Callable[..., TokenStats] = functools.partial(dispatch.call, IMPLEMENTATIONS, plan.choice, forward)
    if plan.shards is not None:
        run = functools.partial(vocabulary_parallel.statistics, run, plan.shards)
    return run(hidden, head, ids, scale, count)


def _forward(plan: _Plan, *primals: Any) -> tuple[TokenStats, tuple]:
    hidden, head, ids, scale, count = jax.tree.map(lambda primal: primal.value, primals)
    stats = _statistics(plan, hidden, head, ids, scale, count)
    return stats, (hidden, head, ids, scale, count, stats.lse, stats.entropy)


def _backward(plan: _Plan, residuals: tuple, cotangent: TokenStats) -> tuple[Array, Array, None, None, None]:
    def backward(module: ModuleType) -> Callable[..., tuple[Array, Array]]:
        def run(
            hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None, *others: Any
        ) -> tuple[Array, Array]:
            if count is None:
                return module.backward(hidden, head, ids, scale, *others, chunk=plan.chunk)
            return leading.backward(module.backward, count, plan.chunk, hidden, head, ids, scale, *others)

        return run

    hidden, head, ids, scale, count, lse, entropy = residuals
    if isinstance(cotangent.entropy, SymbolicZero):
        # Then it is multiplied by 0, and where nobody else looks at it either, the forward pass need not compute it.
        entropy = jnp.zeros_like(lse)
    cotangent = jax.tree.map(
        lambda each: jnp.zeros(each.shape, jnp.float32) if isinstance(each, SymbolicZero) else each, cotangent
    )
    run: Callable[..., tuple[Array, Array]] = functools.partial(dispatch.call, IMPLEMENTATIONS, plan.choice, backward)
    if plan.shards is not None:
        run = functools.partial(vocabulary_parallel.gradients, run, plan.shards)
    grad_hidden, grad_head = run(hidden, head, ids, scale, count, lse, entropy, cotangent)
    return grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype), None, None, None


_token_stats = jax.custom_vjp(_statistics, nondiff_argnums=(0,))
_token_stats.defvjp(_forward, _backward, symbolic_zeros=True)
