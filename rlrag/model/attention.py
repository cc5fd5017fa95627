"""Attention: rotary positions, the one mask rule, and dense attention under a mask (the rollout's)."""

import math

import jax
import jax.numpy as jnp

from kernels.packed_attention.reference import MASKED as MASKED
from kernels.packed_attention.reference import mix_values
from kernels.packed_attention.visibility import Visibility
from rlrag.model.architecture import Architecture

FAR = 2**30  # a window over all


def frequencies(a: Architecture, local: bool = False) -> jax.Array:
    """theta^(-2i/H) of the pairs of a head, stretched as the architecture says: [H/2] float32, in radians a token.

    llama3: a frequency that turns fewer than rope_low times within rope_positions is divided by rope_factor, one of
    more than rope_high kept, with a linear mixture between (as the Llama 3.1 release computes it).
    """
    half = a.head_dim // 2
    theta = a.local_rope_theta if local and a.local_rope_theta else a.rope_theta
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not a.rope_scaling or (local and a.local_rope_theta):
        return plain
    if a.rope_scaling == "linear":
        return plain / a.rope_factor
    turns = a.rope_positions * plain / (2 * math.pi)
    kept = jnp.clip((turns - a.rope_low) / (a.rope_high - a.rope_low), 0, 1)
    return plain * ((1 - kept) / a.rope_factor + kept)


def rotation(positions: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * frequency, [..., 1, H/2] float32 for positions [...]: once a forward pass."""
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotations(a: Architecture, positions: jax.Array) -> dict[bool, tuple[jax.Array, jax.Array]]:
    """The rotation of local (True) and of global layers (False), of those that there are."""
    return {local: rotation(positions, frequencies(a, local)) for local in set(a.local)}


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


def visibility(a: Architecture, segment: jax.Array, parent: jax.Array, positions: jax.Array) -> dict[bool, Visibility]:
    """What local layers (True: the last `window` tokens alone) and global ones (False) see, of those that there are.

    The one mask rule: token i sees token j iff j <= i and j's segment is i's or an ancestor of it. Windows are counted
    by positions, those of a conversation, not by columns of a row. segment, positions [B, T], parent [B, S].
    """
    first, last = intervals(parent)
    first, last = (jnp.take_along_axis(each, segment, axis=1) for each in (first, last))
    window = {local: jnp.int32(a.window if local else FAR) if any(a.local) else None for local in set(a.local)}
    return {local: Visibility(first, last, positions, window[local]) for local in window}


def intervals(parent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segments numbered depth first: [B, S] parent of each (0: none) -> the number of each, and one more than that of
    its last descendant, int32. A segment is another's ancestor, or it, iff its interval holds the other's number."""
    below = ancestors(parent)  # [B, s, t]: t is s or above it
    size = jnp.sum(below, 1, dtype=jnp.int32)  # [B, S] descendants, itself included
    index = jnp.arange(parent.shape[-1])
    older = (parent[:, :, None] == parent[:, None, :]) & (index > index[:, None])  # [B, u, t]: u a sibling before t
    # One more than what stands before it among its siblings; segment 0, padding, is a sibling of those without parents.
    step = 1 + jnp.einsum("but,bu->bt", older.astype(jnp.int32), size)
    first = jnp.einsum("bst,bt->bs", below.astype(jnp.int32), step)
    return first, first + size


def views(a: Architecture, visible: jax.Array, queries: jax.Array, keys: jax.Array) -> dict[bool, jax.Array]:
    """What local (True) and global layers (False) see, of those that there are: `visible` [B, C, S], and of it the last
    `window` tokens up to each query, by positions [B, C] and [B, S]: those of a conversation, not of a packed row."""
    near = visible & (queries[:, :, None] - keys[:, None, :] < a.window) if a.window else visible
    return {local: near if local else visible for local in set(a.local)}


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float | None = None
) -> jax.Array:
    """Softmax attention with grouped queries; scores and softmax in float32.

    query [B, C, N, H]; key, value [K, B, S, H]; visible [B, C, S] -> [B, C, N, H]. scale of the scores; None: H^-0.5.
    Heads lead, so that a view gathered from pages needs no transposition.
    """
    B, C, N, H = query.shape
    K = key.shape[0]
    # The group's queries ride along the row dimension, so that each kv head of a row is one matrix product.
    q = (query * (scale or H**-0.5)).reshape(B, C, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, N // K * C, H)
    out = mix_values(q, key, value, visible)
    return out.reshape(K, B, N // K, C, H).transpose(1, 3, 0, 2, 4).reshape(B, C, N, H)
