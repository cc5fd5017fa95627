"""Attention: rotary positions, the one mask rule, and the dense attention of training rows."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that may see nothing (padding) gives a mean, never NaN


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotate pairs (i, i + H/2) of each head by position * theta^(-2i/H) (RoPE, Su et al. 2021, eq. 34; half-split
    layout of the Hugging Face checkpoints). x [..., heads, H], positions [...]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [..., 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def ancestors(parent: jax.Array) -> jax.Array:
    """[B, S] parent of each segment (0: none) -> [B, S, S] bool: column is the row's segment or an ancestor of it.

    Segment 0 is padding and sees padding alone. Three squarings follow chains of up to eight parents.
    """
    num_segments = parent.shape[-1]
    index = jnp.arange(num_segments)
    itself = index[:, None] == index
    table = itself | ((parent[..., None] == index) & (parent[..., None] > 0))
    for _ in range(3):
        table = jnp.einsum("bij,bjk->bik", table.astype(jnp.float32), table.astype(jnp.float32)) > 0
    return table


def visibility(segment: jax.Array, parent: jax.Array) -> jax.Array:
    """The one mask rule: token i sees token j iff j <= i and j's segment is i's or an ancestor of it.

    segment [B, T], parent [B, S] -> [B, T, T] bool.
    """
    num_tokens = segment.shape[1]
    onehot = jax.nn.one_hot(segment, parent.shape[1], dtype=jnp.float32)  # [B, T, S]
    related = jnp.einsum("bis,bst,bjt->bij", onehot, ancestors(parent).astype(jnp.float32), onehot) > 0
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    return related & causal


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention with grouped queries; scores and softmax in float32.

    query [B, C, N, H]; key, value [B, K, S, H]; visible [B, C, S] -> [B, C, N, H].
    """
    B, C, N, H = query.shape
    K = key.shape[1]
    # The group's queries ride along the row dimension, so that each kv head is one matrix product.
    q = (query * H**-0.5).reshape(B, C, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * C, H)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, N // K, C, -1)
    scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(B, K, N // K * C, -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, value)
    return out.reshape(B, K, N // K, C, H).transpose(0, 3, 1, 2, 4).reshape(B, C, N, H)
