"""Attention: rotary positions, the one mask rule, and the dense attention of training rows."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that may see nothing (padding) gives a mean, never NaN


def rotation(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * theta^(-2i/H), [..., 1, H/2] float32 for positions [...]: once a forward pass."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + H/2) of each head (RoPE, Su et al. 2021, equation 34; half-split layout of the Hugging Face
    checkpoints). x [..., heads, H]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
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

    query [B, C, N, H]; key, value [K, B, S, H]; visible [B, C, S] -> [B, C, N, H]. Heads lead, so that a view gathered
    from pages needs no transposition.
    """
    B, C, N, H = query.shape
    K = key.shape[0]
    # The group's queries ride along the row dimension, so that each kv head of a row is one matrix product.
    q = (query * H**-0.5).reshape(B, C, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, N // K * C, H)
    out = mix_values(q, key, value, visible)
    return out.reshape(K, B, N // K, C, H).transpose(1, 3, 0, 2, 4).reshape(B, C, N, H)


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
