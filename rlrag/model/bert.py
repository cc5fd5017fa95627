"""The BERT family of text encoders (Devlin et al. 2019): every token sees the whole of its own text.

Learned positions and token types are added to the word embeddings; norms stand behind the sums (post-norm); GELU with
the error function. The pooler and the heads of the pre-training tasks are deliberately absent: retrieval pools the
hidden states itself (`rlrag.model.pooling`).
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlrag.mesh import Axes, constrain
from rlrag.model.architecture import EncoderArchitecture
from rlrag.model.attention import attend
from rlrag.model.parameters import Leaf, drawn, laid
from rlrag.model.remat import rematerialized


@flax.struct.dataclass
class BertLayers:
    """All layers, stacked on axis 0 (L)."""

    query: jax.Array  # [L, D, D]
    key: jax.Array  # [L, D, D]
    value: jax.Array  # [L, D, D]
    query_bias: jax.Array  # [L, D]
    key_bias: jax.Array  # [L, D]
    value_bias: jax.Array  # [L, D]
    output: jax.Array  # [L, D, D]
    output_bias: jax.Array  # [L, D]
    attention_norm: jax.Array  # [L, D]
    attention_norm_bias: jax.Array  # [L, D]
    up: jax.Array  # [L, D, F]
    up_bias: jax.Array  # [L, F]
    down: jax.Array  # [L, F, D]
    down_bias: jax.Array  # [L, D]
    mlp_norm: jax.Array  # [L, D]
    mlp_norm_bias: jax.Array  # [L, D]


@flax.struct.dataclass
class Bert:
    word: jax.Array  # [V, D]
    position: jax.Array  # [max_positions, D]
    token_type: jax.Array  # [num_types, D]
    embed_norm: jax.Array  # [D]
    embed_norm_bias: jax.Array  # [D]
    layers: BertLayers


def describe(architecture: EncoderArchitecture) -> Bert:
    """The Leaf of every parameter, in the parameters' own tree; initial values as BERT's (section A.2)."""
    a = architecture
    a.check()
    L, D, F = a.num_layers, a.embed_dim, a.mlp_dim

    def matrix(shape: tuple[int, ...], axes: Axes) -> Any:
        return Leaf(shape, axes, 0.02)

    def bias(shape: tuple[int, ...], axis: str | None = None) -> Any:
        return Leaf(shape, (*(None,) * (len(shape) - 1), axis), 0.0)

    def scale(shape: tuple[int, ...]) -> Any:
        return Leaf(shape, (None,) * len(shape), 0.0, mean=1.0)

    layers = BertLayers(
        query=matrix((L, D, D), (None, "embed", "heads")),
        key=matrix((L, D, D), (None, "embed", "heads")),
        value=matrix((L, D, D), (None, "embed", "heads")),
        query_bias=bias((L, D), "heads"),
        key_bias=bias((L, D), "heads"),
        value_bias=bias((L, D), "heads"),
        output=matrix((L, D, D), (None, "heads", "embed")),
        output_bias=bias((L, D)),
        attention_norm=scale((L, D)),
        attention_norm_bias=bias((L, D)),
        up=matrix((L, D, F), (None, "embed", "mlp")),
        up_bias=bias((L, F), "mlp"),
        down=matrix((L, F, D), (None, "mlp", "embed")),
        down_bias=bias((L, D)),
        mlp_norm=scale((L, D)),
        mlp_norm_bias=bias((L, D)),
    )
    return Bert(
        word=matrix((a.vocab_size, D), ("vocab", "embed")),
        position=matrix((a.max_positions, D), (None, "embed")),
        token_type=matrix((a.num_types, D), (None, "embed")),
        embed_norm=scale((D,)),
        embed_norm_bias=bias((D,)),
        layers=layers,
    )


def shardings(architecture: EncoderArchitecture, mesh: Mesh) -> Any:
    """NamedSharding of every parameter."""
    return laid(describe(architecture), mesh)


def initialize(architecture: EncoderArchitecture, key: jax.Array) -> Bert:
    """Fresh parameters in `param_dtype`."""
    return drawn(describe(architecture), architecture.param_dtype, key)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016, eq. 4), computed in float32. x [..., D]."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def layer(x: jax.Array, weights: BertLayers, visible: jax.Array, a: EncoderArchitecture) -> jax.Array:
    """One post-norm block. x [B*T, D], visible [B, T, T] -> [B*T, D]."""
    B, T = visible.shape[:2]
    cast = partial(jnp.asarray, dtype=x.dtype)

    def heads(weight: jax.Array, bias: jax.Array) -> jax.Array:
        y = (x @ cast(weight) + cast(bias)).reshape(B, T, a.num_heads, a.head_dim)
        return constrain(y, "rows", None, "heads", None)

    q = heads(weights.query, weights.query_bias)
    k, v = heads(weights.key, weights.key_bias), heads(weights.value, weights.value_bias)
    mixed = attend(q, k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3), visible).reshape(B * T, a.embed_dim)
    mixed = mixed @ cast(weights.output) + cast(weights.output_bias)
    x = layer_norm(x + mixed, weights.attention_norm, weights.attention_norm_bias, a.norm_epsilon)
    hidden = jax.nn.gelu(x @ cast(weights.up) + cast(weights.up_bias), approximate=False)
    y = hidden @ cast(weights.down) + cast(weights.down_bias)
    return layer_norm(x + y, weights.mlp_norm, weights.mlp_norm_bias, a.norm_epsilon)


def encode(
    params: Bert,
    a: EncoderArchitecture,
    tokens: jax.Array,
    positions: jax.Array,
    segment: jax.Array,
    token_types: jax.Array | None = None,
) -> jax.Array:
    """Hidden states of packed rows. tokens, positions, segment [B, T] -> [B, T, D].

    A token sees the tokens of its own segment, on both sides; segment 0 is padding and sees padding alone. positions
    count from 0 in each segment and end before `max_positions`. token_types [B, T]: token types (None: all 0).
    """
    B, T = tokens.shape
    visible = segment[:, :, None] == segment[:, None, :]

    def step(x: jax.Array, weights: BertLayers) -> tuple[jax.Array, None]:
        return constrain(layer(x, weights, visible, a), "rows", None), None

    x = params.word[tokens.reshape(-1)] + params.position[positions.reshape(-1)]
    x = x + (params.token_type[0] if token_types is None else params.token_type[token_types.reshape(-1)])
    x = layer_norm(x.astype(a.dtype), params.embed_norm, params.embed_norm_bias, a.norm_epsilon)
    step = rematerialized(step, a.remat)
    x, _ = jax.lax.scan(step, constrain(x, "rows", None), params.layers, unroll=min(a.scan_unroll, a.num_layers))
    return x.reshape(B, T, a.embed_dim)
