"""Decode attention over pages: what a slot's newest token sees of its stream, read where it lies.

The store of the rollout (rlrag/rollout/cache.py) keeps the tokens of all streams in pages of a fixed size, heads
leading, and a table lists each stream's pages in order. Only live pages are read: decoding is bound by memory, and the
room that a slot might grow into costs as much to read as what it has.

cuDNN (``jax.nn.dot_product_attention`` with ``key_value_seq_lengths``) is deliberately no implementation, not even
where a slot is one page: it wants keys as [B, S, K, H] in the order of the slots, while the store has heads first and
pages in the order in which they came free. All of the cache would be gathered and transposed at every step.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.decode_attention import blocked, mosaic_gpu, mosaic_tpu, reference
from kernels.dispatch import Implementation

Array = jax.Array

# In order of preference. The Pallas kernels have not been run on hardware: none is chosen without being named.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.attend, ("cuda",), automatic=(), refuses=mosaic_gpu.refuses),
    "mosaic_tpu": Implementation(mosaic_tpu.attend, ("tpu",), automatic=(), refuses=mosaic_tpu.refuses),
    "blocked": Implementation(blocked.attend),
    "reference": Implementation(reference.attend),
}


def decode_attention(
    query: Array, keys: Array, values: Array, table: Array, length: Array, *, page_size: int,
    window: int | None = None, scale: float | None = None, implementation: str | None = None,
) -> Array:  # fmt: skip
    """softmax(scale query key^T) value over the tokens of each slot's pages; [B, N, H] in the query's dtype.

    Softmax statistics are float32. Neighbouring query heads share a kv head: head i reads kv head i * K // N. Not
    differentiable by contract: it serves sampling.

    Args:
      query: [B, N, H] of the newest token of each slot, which is cached already.
      keys, values: [K, P * page_size, H] the store; what no slot sees may be anything, NaN too.
      table: int [B, n] the pages of each slot in order; entries past the last live one are not read.
      length: int [B] tokens to see, at most n * page_size; 0 is an idle slot and gives zeros.
      page_size: tokens a page.
      window: see the last `window` tokens only (local layers); None or 0: all.
      scale: of the scores; None: H^-0.5.
      implementation: a name, or None for the best on this platform.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    B, N, H = query.shape
    K = keys.shape[0]
    if keys.shape != values.shape or keys.shape[2] != H or N % K or keys.shape[1] % page_size:
        raise ValueError(
            f"query {query.shape}, keys {keys.shape} and values {values.shape} must be [B, N, H] and twice "
            f"[K, P * {page_size}, H], with N a multiple of K"
        )
    if table.ndim != 2 or table.shape[0] != B or length.shape != (B,):
        raise ValueError(f"table {table.shape} and length {length.shape} must be [B, n] and [B] with B = {B}")
    if query.dtype != keys.dtype or keys.dtype != values.dtype:
        raise ValueError(
            f"query, keys and values must be of one dtype, got {query.dtype}, {keys.dtype}, {values.dtype}"
        )
    choice = dispatch.choose(
        "decode_attention", IMPLEMENTATIONS, implementation, dtype=jnp.dtype(keys.dtype), heads=N, kv_heads=K,
        head_dim=H, page_size=page_size,
    )  # fmt: skip
    arguments = query * (scale or H**-0.5), keys, values, table.astype(jnp.int32), length.astype(jnp.int32)
    member = functools.partial(functools.partial, page_size=page_size, window=window or None)
    return dispatch.call(IMPLEMENTATIONS, choice, member, *arguments)
