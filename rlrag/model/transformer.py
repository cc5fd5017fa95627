"""The decoder. One layer function serves training (stacked weights, scanned) and decoding (packed, unrolled).

Activations are flat, [rows * tokens, D], between attentions: on CPU XLA turns the two-dimensional products into one
large GEMM and the three-dimensional ones into several small ones (about 2x in the update, docs/LOG.md).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.packed_attention.api import attend
from rlrag.mesh import MODEL, axes_of, constrain
from rlrag.model.adapters import LowRank, Voices, add
from rlrag.model.architecture import Architecture
from rlrag.model.attention import rotate, rotations, visibility
from rlrag.model.decoding import WHOLE, DecodeLayer, DecodeWeights, Parts
from rlrag.model.parameters import Layers, Transformer
from rlrag.model.quantized import Quantized, times
from rlrag.model.remat import rematerialized

# (layer number, query [B, C, N, H], key [B, C, K, H], value [B, C, K, H]) -> mixed [B, C, N, H]
Mix = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, a: Architecture) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * (scale + offset) (Zhang and Sennrich 2019, eq. 4), in float32. x [..., D]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + a.norm_epsilon)
    scale = scale.astype(jnp.float32)
    return (y * (scale + a.norm_offset if a.norm_offset else scale)).astype(x.dtype)


def silu_and_slope(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    sigmoid = jax.nn.sigmoid(g.astype(jnp.float32)).astype(g.dtype)
    silu = g * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def gelu_tanh_and_slope(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hendrycks and Gimpel 2016, section 2: g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))), and its slope."""
    x = g.astype(jnp.float32)
    inner = (2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)
    tanh = jnp.tanh(inner)
    slope = (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * (2 / jnp.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)
    return (x / 2 * (1 + tanh)).astype(g.dtype), slope.astype(g.dtype)


# Name in the architecture -> (the function, the function with its slope).
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (jax.nn.silu, silu_and_slope),
    "gelu_tanh": (partial(jax.nn.gelu, approximate=True), gelu_tanh_and_slope),
}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def gated(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, activation: str) -> jax.Array:
    """(activation(x gate) * (x up)) down (Shazeer 2020, eq. 6). x [M, D] -> [M, D]."""
    return gated_forward(x, gate, up, down, activation)[0]


def gated_forward(x, gate, up, down, activation):
    g, u = x @ gate, x @ up
    return (ACTIVATIONS[activation][0](g) * u) @ down, (x, g, u, gate, up, down)


def gated_backward(activation, residuals, dy):
    x, g, u, gate, up, down = residuals
    active, slope = ACTIVATIONS[activation][1](g)
    dh = dy @ down.T
    # Without the barrier XLA:CPU fuses the elementwise part into each product and recomputes it in every one.
    hidden, dg, du = jax.lax.optimization_barrier((active * u, dh * u * slope, dh * active))
    return dg @ gate.T + du @ up.T, x.T @ dg, x.T @ du, hidden.T @ dy


gated.defvjp(gated_forward, gated_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def glu(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """activation(gate) * up of two products that adapters have added to. [M, F] -> [M, F]."""
    return ACTIVATIONS[activation][0](gate) * up


def glu_backward(activation, residuals, dh):
    gate, up = residuals
    active, slope = ACTIVATIONS[activation][1](gate)
    return jax.lax.optimization_barrier((dh * up * slope, dh * active))  # as in `gated`


glu.defvjp(lambda gate, up, activation: (glu(gate, up, activation), (gate, up)), glu_backward)


Low = Mapping[str, LowRank]


def project(
    x: jax.Array, weights: Layers | DecodeLayer, a: Architecture, low: Low, voices: Voices | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [M, D] -> query [M, N, H], key and value [M, K, H], before rotation."""
    query_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    if isinstance(weights, DecodeLayer):
        qkv = times(x, weights.qkv)
        if weights.qkv_bias is not None:
            qkv = qkv + weights.qkv_bias
        q, k, v = jnp.split(qkv, [query_dim, query_dim + kv_dim], axis=-1)
    else:
        q, k, v = times(x, weights.query), times(x, weights.key), times(x, weights.value)
        if weights.query_bias is not None:
            cast = partial(jnp.asarray, dtype=x.dtype)
            q, k, v = q + cast(weights.query_bias), k + cast(weights.key_bias), v + cast(weights.value_bias)
    q, k, v = (add(y, x, name, low, voices) for name, y in (("query", q), ("key", k), ("value", v)))
    q = q.reshape(-1, a.num_heads, a.head_dim)
    k = k.reshape(-1, a.num_kv_heads, a.head_dim)
    v = v.reshape(-1, a.num_kv_heads, a.head_dim)
    if weights.query_norm is not None and weights.key_norm is not None:
        q, k = rms_norm(q, weights.query_norm, a), rms_norm(k, weights.key_norm, a)
    return q, k, v


def feed_forward(
    x: jax.Array, weights: Layers | DecodeLayer, a: Architecture, low: Low, voices: Voices | None
) -> jax.Array:
    if isinstance(weights, DecodeLayer):
        gate, up = jnp.split(times(x, weights.gate_up), 2, axis=-1)
    elif voices is None and not any(isinstance(each, Quantized) for each in (weights.gate, weights.up, weights.down)):
        cast = partial(jnp.asarray, dtype=x.dtype)
        return gated(x, cast(weights.gate), cast(weights.up), cast(weights.down), a.activation)
    else:
        gate, up = times(x, weights.gate), times(x, weights.up)
    hidden: Any = glu(add(gate, x, "gate", low, voices), add(up, x, "up", low, voices), a.activation)
    return add(times(hidden, weights.down), hidden, "down", low, voices)


def summed(x: jax.Array, number: int) -> jax.Array:
    """Of what `number` devices of a shard_map have found each; 1: x is whole."""
    return x if number == 1 else jax.lax.psum(x, MODEL)


def layer(
    x: jax.Array, weights: Layers | DecodeLayer, angles: tuple[jax.Array, jax.Array], a: Architecture, mix: Callable,
    low: Low, voices: Voices | None, cut: Parts = WHOLE,
) -> jax.Array:  # fmt: skip
    """One pre-norm block. x [B*C, D], angles of [B, C]; mix(query, key, value) [B, C, heads, H] -> [B, C, N, H]; low:
    what adapters add to each matrix of the layer, as loud as voices say; cut: of weights inside a shard_map, where a is
    what one device computes."""
    B, C = angles[0].shape[:2]
    q, k, v = project(rms_norm(x, weights.attention_norm, a), weights, a, low, voices)
    q, k, v = (heads.reshape(B, C, -1, a.head_dim) for heads in (q, k, v))
    q, k = rotate(q, *angles), rotate(k, *angles)
    mixed = mix(q, k, v).reshape(B * C, a.num_heads * a.head_dim)
    mixed = summed(add(times(mixed, weights.output), mixed, "output", low, voices), cut.heads)
    x = x + (mixed if weights.post_attention_norm is None else rms_norm(mixed, weights.post_attention_norm, a))
    y = summed(feed_forward(rms_norm(x, weights.mlp_norm, a), weights, a, low, voices), cut.mlp)
    return x + (y if weights.post_mlp_norm is None else rms_norm(y, weights.post_mlp_norm, a))


def speaking(a: Architecture, coefficients: jax.Array) -> Voices:
    """Who speaks in tokens with coefficients [..., A]."""
    return Voices(coefficients.reshape(-1, coefficients.shape[-1]) * a.adapters.scale, a.adapters.dropout)


def trunk(
    params: Transformer, a: Architecture, tokens: jax.Array, positions: jax.Array, segment: jax.Array,
    parent: jax.Array, coefficients: jax.Array | None = None, key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Hidden states of packed rows. tokens, positions, segment [B, T], parent [B, S] -> [B, T, D], after final norm.

    coefficients [B, S, A] of each adapter in a segment; None: the base. key: of the adapters' dropout; None: without.
    """
    B, T = tokens.shape
    low, voices = {}, None
    if params.adapters is not None and coefficients is not None:
        low = params.adapters.layers
        voices = speaking(a, jnp.take_along_axis(coefficients, segment[..., None], axis=1))
    seen = visibility(a, segment, parent, positions)
    angles = rotations(a, positions)

    def step(x: jax.Array, xs: tuple[Layers, Low, jax.Array | None, jax.Array | None]) -> tuple[jax.Array, None]:
        weights, own_low, local, own_key = xs
        own = None if voices is None else voices._replace(key=own_key)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q = constrain(q, "rows", None, "heads", None)
            k, v = (constrain(x, "rows", None, "kv_heads", None) for x in (k, v))
            scale = a.attention_scale or a.head_dim**-0.5
            return attend(
                q * jnp.asarray(scale, q.dtype), k, v, chosen(seen, local), axes_of("rows"), axes_of("kv_heads")
            )

        return constrain(layer(x, weights, chosen(angles, local), a, mix, own_low, own), "rows", None), None

    # Columns of the table are gathered first: looking tokens up in columns that lie where rows of tokens do makes the
    # compiler replicate what was found.
    table = constrain(params.table, "vocab", None)
    x = table[tokens.reshape(-1)].astype(a.dtype) * jnp.asarray(a.embed_scale, a.dtype)
    keys = None if key is None else jax.random.split(key, a.num_layers)
    xs = params.layers, low, jnp.array(a.local) if len(seen) > 1 else None, keys
    x, _ = jax.lax.scan(
        rematerialized(step, a.remat), constrain(x, "rows", None), xs, unroll=min(a.scan_unroll, a.num_layers)
    )
    return rms_norm(x, params.final_norm, a).reshape(B, T, a.embed_dim)


def chosen(kinds: dict[bool, Any], local: jax.Array | None) -> Any:
    """Of what local and global layers have, this layer's; local None: all layers are of one kind."""
    if local is None:
        (only,) = kinds.values()
        return only
    return jax.tree.map(partial(jnp.where, local), kinds[True], kinds[False])


def look_up(table: jax.Array, tokens: jax.Array, number: int) -> jax.Array:
    """Rows of a table [V, D], of which each of `number` devices has a part."""
    if number == 1:
        return table[tokens]
    own = tokens - jax.lax.axis_index(MODEL) * table.shape[0]
    inside = (own >= 0) & (own < table.shape[0])
    return summed(jnp.where(inside[:, None], table[jnp.where(inside, own, 0)], 0), number)


def extend(
    weights: DecodeWeights, a: Architecture, tokens: jax.Array, positions: jax.Array, mix: Mix,
    coefficients: jax.Array | None = None, cut: Parts = WHOLE,
) -> jax.Array:  # fmt: skip
    """Hidden states of new tokens given a cache that `mix` reads and writes. tokens, positions [B, C] -> [B, C, D].

    coefficients [B, A] of each adapter in a row; None: the base. cut: of the weights, inside a shard_map; `mix` is
    given this device's heads.
    """
    B, C = tokens.shape
    voices = None if coefficients is None else speaking(a, jnp.repeat(coefficients, C, 0))
    x = look_up(weights.embed, tokens.reshape(-1), cut.vocab) * jnp.asarray(a.embed_scale, a.dtype)
    angles, own = rotations(a, positions), cut.own(a)
    for number, weights_ in enumerate(weights.layers):
        x = layer(x, weights_, angles[a.local[number]], own, partial(mix, number), weights_.low, voices, cut)
    return rms_norm(x, weights.final_norm, a).reshape(B, C, a.embed_dim)


def vocabulary_logits(weights: DecodeWeights, hidden: jax.Array, cut: Parts) -> jax.Array:
    """hidden [B, D] -> [B, V] float32, whole on every device: what is sampled must not depend on the mesh."""
    logits = jnp.einsum("bd,vd->bv", hidden, weights.output_head, preferred_element_type=jnp.float32)
    return logits if cut.vocab == 1 else jax.lax.all_gather(logits, MODEL, axis=1, tiled=True)
