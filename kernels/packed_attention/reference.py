"""Dense attention: the scores of all pairs, masked. The fastest where rows are short; the others are held to it."""

import jax
import jax.numpy as jnp

from kernels.packed_attention.visibility import Visibility
from kernels.packed_attention.visibility import visible as written_out

Array = jax.Array

MASKED = -1e30  # finite: a row that may see nothing (padding) gives a mean, never NaN


def attend(query: Array, key: Array, value: Array, visible: Visibility) -> Array:
    """query [B, T, N, H] (scaled), key and value [B, T, K, H] -> [B, T, N, H]."""
    B, T, N, H = query.shape
    K = key.shape[2]
    # The group's queries ride along the row dimension, so that each kv head of a row is one matrix product.
    q = query.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, N // K * T, H)
    out = mix_values(q, key.transpose(2, 0, 1, 3), value.transpose(2, 0, 1, 3), written_out(visible))
    return out.reshape(K, B, N // K, T, H).transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def mix_values(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """softmax(query key^T) value; query [K, B, G*C, H] (scaled), key and value [K, B, S, H], visible [B, C, S].

    The gradient is written out because XLA:CPU fuses the softmax's own gradient into each of the products and computes
    it again in every one (docs/LOG.md).
    """
    return mix_values_forward(query, key, value, visible)[0]


def mix_values_forward(query, key, value, visible):
    K, B, rows, _ = query.shape
    C, S = visible.shape[1:]
    scores = jnp.einsum("kbrh,kbsh->kbrs", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None], scores.reshape(K, B, rows // C, C, S), MASKED).reshape(K, B, rows, S)
    # The maximum is subtracted: without it long contexts overflow.
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    weights = (weights / jnp.sum(weights, -1, keepdims=True)).astype(value.dtype)
    out = jnp.einsum("kbrs,kbsh->kbrh", weights, value)
    return out, (query, key, value, weights, out)


def mix_values_backward(residuals, d_out):
    query, key, value, weights, out = residuals
    d_weights = jnp.einsum("kbrh,kbsh->kbrs", d_out, value, preferred_element_type=jnp.float32)
    inner = jnp.sum((d_out * out).astype(jnp.float32), -1, keepdims=True)
    d_scores = jax.lax.optimization_barrier((weights * (d_weights - inner)).astype(query.dtype))
    d_query = jnp.einsum("kbrs,kbsh->kbrh", d_scores, key)
    d_key = jnp.einsum("kbrs,kbrh->kbsh", d_scores, query)
    d_value = jnp.einsum("kbrs,kbrh->kbsh", weights, d_out)
    return d_query, d_key, d_value, None


mix_values.defvjp(mix_values_forward, mix_values_backward)
