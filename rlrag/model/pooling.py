"""From hidden states to one vector a text: pooling by segment, and the whole way of any encoder we have.

A decoder embeds too, with its last token (Qwen3-Embedding): it is the trunk of `rlrag.model.transformer`, pooled.
"""

import jax
import jax.numpy as jnp

from rlrag.model import bert, transformer
from rlrag.model.architecture import Architecture, EncoderArchitecture
from rlrag.model.parameters import Transformer

POOLINGS = ("cls", "mean", "last")


def pooled(hidden: jax.Array, segment: jax.Array, num_segments: int, pooling: str) -> jax.Array:
    """One vector a segment. hidden [B, T, D], segment [B, T] -> [B, num_segments, D] float32.

    pooling: "cls" the first token of the segment, "mean" the mean of its tokens, "last" its last token. A segment
    without tokens gives zeros. Segment 0 is padding: what stands there means nothing.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: choose {', '.join(POOLINGS)}")
    mine = segment[:, None, :] == jnp.arange(num_segments)[:, None]  # [B, S, T]
    if pooling == "mean":
        count = jnp.sum(mine, -1, keepdims=True)
        # Full precision: accelerators cut the operands of a float32 product otherwise.
        total = jnp.einsum(
            "bst,btd->bsd", mine.astype(jnp.float32), hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return total / jnp.maximum(count, 1)
    T = segment.shape[1]
    column = jnp.argmax(mine, -1) if pooling == "cls" else T - 1 - jnp.argmax(mine[..., ::-1], -1)
    chosen = jnp.take_along_axis(hidden, column[..., None], axis=1).astype(jnp.float32)
    return jnp.where(jnp.any(mine, -1)[..., None], chosen, 0.0)


def normalized(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; a zero vector stays zero, and its gradient finite."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def embed(
    params: bert.Bert | Transformer,
    a: EncoderArchitecture | Architecture,
    tokens: jax.Array,
    positions: jax.Array,
    segment: jax.Array,
    num_segments: int,
    *,
    pooling: str,
    normalize: bool,
) -> jax.Array:
    """Vectors of the texts of packed rows. tokens, positions, segment [B, T] -> [B, num_segments, D] float32."""
    if isinstance(a, EncoderArchitecture):
        assert isinstance(params, bert.Bert)
        hidden = bert.encode(params, a, tokens, positions, segment)
    else:
        assert isinstance(params, Transformer)
        parent = jnp.zeros((tokens.shape[0], num_segments), jnp.int32)  # texts stand alone: no shared prefixes
        hidden = transformer.trunk(params, a, tokens, positions, segment, parent)
    vectors = pooled(hidden, segment, num_segments, pooling)
    return normalized(vectors) if normalize else vectors
