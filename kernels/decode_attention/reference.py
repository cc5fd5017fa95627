"""The plain implementation: gather every page a slot may have, then a masked softmax over all of them.

An implementation of ``decode_attention`` is a function with this signature.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

MASKED = -1e30  # finite: a row that sees nothing gives a mean of zeros, never NaN


def attend(
    query: Array, keys: Array, values: Array, table: Array, length: Array, *, page_size: int, window: int | None
) -> Array:
    """softmax(query key^T) value over the first `length` tokens of each slot's pages, of those the last `window`.

    Args:
      query: [B, N, H], scaled.
      keys, values: [K, P * page_size, H].
      table: int [B, n] pages in order; those past a slot's last are not read, whatever they say.
      length: int [B]; 0 gives zeros.

    Returns:
      [B, N, H].
    """
    B, N, H = query.shape
    K, (_, n) = keys.shape[0], table.shape
    key, value = (store.reshape(K, -1, page_size, H)[:, table].reshape(K, B, -1, H) for store in (keys, values))
    seen = visible(jnp.arange(n * page_size), length, window)
    scores = jnp.einsum("bkgh,kbsh->kbgs", query.reshape(B, K, N // K, H), key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, MASKED), axis=-1).astype(value.dtype)
    # What is not seen may be anything, NaN too, and zero times NaN is not zero.
    value = jnp.where(seen[..., None], value, 0)
    return jnp.einsum("kbgs,kbsh->bkgh", weights, value).reshape(B, N, H)


def visible(positions: Array, length: Array, window: int | None) -> Array:
    """Which of the positions [S] each slot [B] sees: bool [B, S]."""
    seen = positions < length[:, None]
    return seen & (positions >= length[:, None] - window) if window else seen
