"""The decoder. One layer function serves training (stacked weights, scanned) and decoding (packed, unrolled).

Activations are flat, [rows * tokens, D], between attentions: on CPU XLA turns the two-dimensional products into one
large GEMM and the three-dimensional ones into several small ones (about 2x in the update, docs/LOG.md).
"""

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from rlrag.mesh import constrain
from rlrag.model.architecture import Architecture
from rlrag.model.attention import attend, rotate, rotation, visibility
from rlrag.model.parameters import Layers, Transformer

# (layer number, query [B, C, N, H], key [B, C, K, H], value [B, C, K, H]) -> mixed [B, C, N, H]
Mix = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class DecodeLayer:
    """One layer for decoding: products that share an input are one matrix, cut once when weights are packed."""

    attention_norm: jax.Array  # [D]
    qkv: jax.Array  # [D, (N + 2K) * H]
    qkv_bias: jax.Array | None  # [(N + 2K) * H]
    query_norm: jax.Array | None  # [H]
    key_norm: jax.Array | None  # [H]
    output: jax.Array  # [N*H, D]
    mlp_norm: jax.Array  # [D]
    gate_up: jax.Array  # [D, 2F]
    down: jax.Array  # [F, D]


@flax.struct.dataclass
class DecodeWeights:
    """Per-layer list: weights sliced or joined inside the decode loop would be sliced or joined at every step."""

    embed: jax.Array  # [V, D]
    layers: tuple[DecodeLayer, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None: tied

    @property
    def output_head(self) -> jax.Array:
        return self.embed if self.head is None else self.head


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich 2019, eq. 4), computed in float32. x [..., D]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down (Shazeer 2020, eq. 6). x [M, D] -> [M, D]."""
    return swiglu_forward(x, gate, up, down)[0]


def swiglu_forward(x, gate, up, down):
    g, u = x @ gate, x @ up
    return (jax.nn.silu(g) * u) @ down, (x, g, u, gate, up, down)


def swiglu_backward(residuals, dy):
    x, g, u, gate, up, down = residuals
    # Without the barrier XLA:CPU fuses the elementwise part into each product and recomputes it in every one.
    sigmoid = jax.nn.sigmoid(g.astype(jnp.float32)).astype(g.dtype)
    silu = g * sigmoid
    dh = dy @ down.T
    hidden, dg, du = jax.lax.optimization_barrier((silu * u, dh * u * (sigmoid + silu * (1 - sigmoid)), dh * silu))
    return dg @ gate.T + du @ up.T, x.T @ dg, x.T @ du, hidden.T @ dy


swiglu.defvjp(swiglu_forward, swiglu_backward)


def project(x: jax.Array, weights: Layers | DecodeLayer, a: Architecture) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [M, D] -> query [M, N, H], key and value [M, K, H], before rotation."""
    query_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    if isinstance(weights, DecodeLayer):
        qkv = x @ weights.qkv
        if weights.qkv_bias is not None:
            qkv = qkv + weights.qkv_bias
        q, k, v = jnp.split(qkv, [query_dim, query_dim + kv_dim], axis=-1)
    else:
        cast = partial(jnp.asarray, dtype=x.dtype)
        q, k, v = x @ cast(weights.query), x @ cast(weights.key), x @ cast(weights.value)
        if weights.query_bias is not None:
            q, k, v = q + cast(weights.query_bias), k + cast(weights.key_bias), v + cast(weights.value_bias)
    q = q.reshape(-1, a.num_heads, a.head_dim)
    k = k.reshape(-1, a.num_kv_heads, a.head_dim)
    v = v.reshape(-1, a.num_kv_heads, a.head_dim)
    if weights.query_norm is not None and weights.key_norm is not None:
        q, k = rms_norm(q, weights.query_norm, a.norm_epsilon), rms_norm(k, weights.key_norm, a.norm_epsilon)
    return q, k, v


def feed_forward(x: jax.Array, weights: Layers | DecodeLayer) -> jax.Array:
    if isinstance(weights, DecodeLayer):
        gate, up = jnp.split(x @ weights.gate_up, 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ weights.down
    cast = partial(jnp.asarray, dtype=x.dtype)
    return swiglu(x, cast(weights.gate), cast(weights.up), cast(weights.down))


def layer(
    x: jax.Array, weights: Layers | DecodeLayer, angles: tuple[jax.Array, jax.Array], a: Architecture, mix: Callable
) -> jax.Array:
    """One pre-norm block. x [B*C, D], angles of [B, C]; mix(query, key, value) [B, C, heads, H] -> [B, C, N, H]."""
    B, C = angles[0].shape[:2]
    q, k, v = project(rms_norm(x, weights.attention_norm, a.norm_epsilon), weights, a)
    q, k, v = (heads.reshape(B, C, -1, a.head_dim) for heads in (q, k, v))
    q, k = rotate(q, *angles), rotate(k, *angles)
    mixed = mix(q, k, v).reshape(B * C, a.num_heads * a.head_dim)
    x = x + mixed @ weights.output.astype(x.dtype)
    return x + feed_forward(rms_norm(x, weights.mlp_norm, a.norm_epsilon), weights)


def trunk(
    params: Transformer, a: Architecture, tokens: jax.Array, positions: jax.Array, segment: jax.Array, parent: jax.Array
) -> jax.Array:
    """Hidden states of packed rows. tokens, positions, segment [B, T], parent [B, S] -> [B, T, D], after final norm."""
    B, T = tokens.shape
    visible = visibility(segment, parent)
    angles = rotation(positions, a.head_dim, a.rope_theta)

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = constrain(q, "rows", None, "heads", None)
        k, v = (constrain(x, "rows", None, "kv_heads", None) for x in (k, v))
        return attend(q, k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3), visible)

    def step(x: jax.Array, weights: Layers) -> tuple[jax.Array, None]:
        return constrain(layer(x, weights, angles, a, mix), "rows", None), None

    if a.remat:
        step = jax.checkpoint(step)
    x = params.embed[tokens.reshape(-1)].astype(a.dtype) * jnp.asarray(a.embed_scale, a.dtype)
    x, _ = jax.lax.scan(step, constrain(x, "rows", None), params.layers, unroll=min(a.scan_unroll, a.num_layers))
    return rms_norm(x, params.final_norm, a.norm_epsilon).reshape(B, T, a.embed_dim)


def pack(params: Transformer, a: Architecture) -> DecodeWeights:
    """Decode layout of the weights, in the activations' dtype, whole on every device. Called once a rollout, so that
    FSDP's parameters are gathered once and not in every round."""
    cast = partial(jnp.asarray, dtype=a.dtype)

    def pack_layer(weights: Layers) -> DecodeLayer:
        biases = [bias for bias in (weights.query_bias, weights.key_bias, weights.value_bias) if bias is not None]
        return DecodeLayer(
            attention_norm=weights.attention_norm,
            qkv=cast(jnp.concatenate([weights.query, weights.key, weights.value], -1)),
            qkv_bias=cast(jnp.concatenate(biases, -1)) if biases else None,
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            output=cast(weights.output),
            mlp_norm=weights.mlp_norm,
            gate_up=cast(jnp.concatenate([weights.gate, weights.up], -1)),
            down=cast(weights.down),
        )

    layers = tuple(pack_layer(jax.tree.map(lambda leaf: leaf[i], params.layers)) for i in range(a.num_layers))  # noqa: B023
    head = None if params.head is None else cast(params.head)
    packed = DecodeWeights(cast(params.embed), layers, params.final_norm, head)
    return jax.tree.map(lambda leaf: constrain(leaf, *(None,) * leaf.ndim), packed)


def extend(weights: DecodeWeights, a: Architecture, tokens: jax.Array, positions: jax.Array, mix: Mix) -> jax.Array:
    """Hidden states of new tokens given a cache that `mix` reads and writes. tokens, positions [B, C] -> [B, C, D]."""
    B, C = tokens.shape
    x = weights.embed[tokens.reshape(-1)] * jnp.asarray(a.embed_scale, a.dtype)
    angles = rotation(positions, a.head_dim, a.rope_theta)
    for number, layer_weights in enumerate(weights.layers):
        x = layer(x, layer_weights, angles, a, partial(mix, number))
    return rms_norm(x, weights.final_norm, a.norm_epsilon).reshape(B, C, a.embed_dim)
