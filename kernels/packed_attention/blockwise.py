"""Attention of packed rows by blocks: what no token of a block may see is not computed, and no [T, T] is ever held.

The online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867) over key blocks, as in FlashAttention-2 (Dao 2023,
arXiv 2307.08691, algorithms 1 and 2): forward keeps the log of the sum of exponentials of each query, backward computes
the weights again from it. Every block of queries walks the list of key blocks that it may see, which the data give:
the upper triangle, other conversations of the row and siblings under one prefix are never touched. Plain XLA.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import loops
from kernels.packed_attention.sharded import by_rows
from kernels.packed_attention.visibility import Visibility, live_blocks, seen

Array = jax.Array

MASKED = -1e30  # finite: what a block's first key may not see is washed out by the first that it may
SMALL, LARGE, LONG = 64, 256, 2048


def block_size(num_tokens: int) -> int:
    """Tokens of a block of queries, and of keys, where rows have so many. Small blocks skip more, large ones keep
    several cores busy (CPU, 2 cores, forward and backward, dense | 64 | 128 | 256: four rows of 579 columns 57 | 37 |
    49 | 57 ms, two of 1,031 103 | 65 | 69 | 67, two of 2,051 310 | 168 | 158 | 145)."""
    return SMALL if num_tokens < LONG else LARGE


def attend(
    query: Array, key: Array, value: Array, visible: Visibility, rows: tuple[str, ...] = (), heads: tuple[str, ...] = ()
) -> Array:
    """query [B, T, N, H] (scaled), key and value [B, T, K, H] -> [B, T, N, H]. rows, heads: axes of the mesh that they
    lie over."""
    return _attend(rows, heads, query, key, value, visible)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rows, heads, query, key, value, visible):
    return by_rows(forward, (query, key, value, visible), rows, heads)[0]


def _attend_forward(rows, heads, query, key, value, visible):
    out, lse = by_rows(forward, (query, key, value, visible), rows, heads)
    return out, (query, key, value, visible, out, lse)


def _attend_backward(rows, heads, residuals, d_out):
    return *by_rows(backward, (*residuals, d_out), rows, heads), None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: Array, key: Array, value: Array, visible: Visibility, sizes: tuple[int, int] | None = None
) -> tuple[Array, Array]:
    """query [B, T, N, H] (scaled), key and value [B, T, K, H] -> mixed [B, T, N, H], lse [B, T, N] float32."""
    B, T, N, _ = query.shape
    blocks = _Blocks(visible, T, sizes)
    q, k, v = blocks.queries(query, key.shape[2]), blocks.keys(key), blocks.keys(value)

    def walk(index: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        row, i = index // blocks.number, index % blocks.number
        q_block = q[row, i]  # [K, G * queries, H]

        def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, mixed = state
            j = blocks.order[row, i, number]
            scores = blocks.masked(_product(q_block, k[row, j], 2, 2), row, i, j)
            new = jnp.maximum(highest, jnp.max(scores, -1))
            weights = jnp.exp(scores - new[..., None])
            shrunk = jnp.exp(highest - new)
            mixed = mixed * shrunk[..., None] + _product(weights.astype(v.dtype), v[row, j], 2, 1)
            return new, total * shrunk + jnp.sum(weights, -1), mixed

        shape = q_block.shape[:2]
        initial = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_block.shape)
        highest, total, mixed = loops.fori_loop(0, blocks.count[row, i], step, initial, blocks.most)
        out, lse = outputs
        out = lax.dynamic_update_slice(out, (mixed / total[..., None])[None, None], (row, i, 0, 0, 0))
        return out, lax.dynamic_update_slice(lse, (highest + jnp.log(total))[None, None], (row, i, 0, 0))

    initial = jnp.zeros(q.shape), jnp.zeros(q.shape[:-1])
    out, lse = lax.fori_loop(0, B * blocks.number, walk, initial)
    return blocks.tokens(out, N).astype(query.dtype), blocks.tokens(lse[..., None], N)[..., 0]


def backward(
    query: Array, key: Array, value: Array, visible: Visibility, out: Array, lse: Array, d_out: Array,
    sizes: tuple[int, int] | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of query (scaled), key and value, each of its own dtype."""
    B, T, N, _ = query.shape
    K = key.shape[2]
    blocks = _Blocks(visible, T, sizes)
    q, k, v = blocks.queries(query, K), blocks.keys(key), blocks.keys(value)
    d, log = blocks.queries(d_out, K), blocks.queries(lse[..., None], K)
    inner = blocks.queries(jnp.sum((d_out * out).astype(jnp.float32), -1, keepdims=True), K)

    def walk(index: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row, i = index // blocks.number, index % blocks.number
        q_block, d_block, log_block, inner_block = q[row, i], d[row, i], log[row, i], inner[row, i]

        def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            j = blocks.order[row, i, number]
            k_block, v_block = k[row, j], v[row, j]
            scores = blocks.masked(_product(q_block, k_block, 2, 2), row, i, j)
            weights = jnp.exp(scores - log_block)
            d_scores = weights * (_product(d_block, v_block, 2, 2) - inner_block)
            # Without the barrier XLA:CPU fuses the elementwise part into each product that reads it.
            weights, d_scores = lax.optimization_barrier((weights.astype(v.dtype), d_scores.astype(q.dtype)))
            dq = dq + _product(d_scores, k_block, 2, 1)
            dk = _added(dk, _product(d_scores, q_block, 1, 1), row, j)
            dv = _added(dv, _product(weights, d_block, 1, 1), row, j)
            return dq, dk, dv

        dq, dk, dv = gradients
        start = jnp.zeros(q_block.shape), dk, dv
        own, dk, dv = loops.fori_loop(0, blocks.count[row, i], step, start, blocks.most)
        return lax.dynamic_update_slice(dq, own[None, None], (row, i, 0, 0, 0)), dk, dv

    initial = jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq, dk, dv = lax.fori_loop(0, B * blocks.number, walk, initial)
    dk, dv = (blocks.tokens(each, K).astype(key.dtype) for each in (dk, dv))
    return blocks.tokens(dq, N).astype(query.dtype), dk, dv


def _added(whole: Array, part: Array, row: Array, j: Array) -> Array:
    return lax.dynamic_update_slice(whole, (whole[row, j] + part)[None, None], (row, j, 0, 0, 0))


def _product(left: Array, right: Array, of_left: int, of_right: int) -> Array:
    """Of each kv head, summed over the named dimensions in float32."""
    dimensions = (((of_left,), (of_right,)), ((0,), (0,)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


class _Blocks:
    """Rows cut into blocks of queries and of keys, and which key blocks each query block walks."""

    def __init__(self, visible: Visibility, num_tokens: int, sizes: tuple[int, int] | None):
        size = block_size(num_tokens)
        self.sizes = sizes = sizes or (size, size)
        self.num_tokens = num_tokens
        self.padding = -num_tokens % math.lcm(*sizes)
        self.number = (num_tokens + self.padding) // sizes[0]
        self.visible = visible.padded(self.padding)
        live = live_blocks(self.visible, *sizes)  # [B, i, j]
        self.count = jnp.sum(live, -1, dtype=jnp.int32)
        self.most = live.shape[2]  # key blocks; those above the diagonal, which none walks, are among them
        self.order = jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)

    def masked(self, scores: Array, row: Array, i: Array, j: Array) -> Array:
        """scores [K, G * queries, keys] of query block i and key block j."""
        own = seen(self.visible, row, i * self.sizes[0], j * self.sizes[1], *self.sizes)
        grouped = scores.reshape(scores.shape[0], -1, *self.sizes)
        return jnp.where(own, grouped, MASKED).reshape(scores.shape)

    def queries(self, x: Array, num_kv_heads: int) -> Array:
        """[B, T, N, H] -> [B, blocks, K, G * queries, H]: the queries of a group are rows of one product."""
        return self._cut(x, num_kv_heads, self.sizes[0])

    def keys(self, x: Array) -> Array:
        """[B, T, K, H] -> [B, blocks, K, keys, H]."""
        return self._cut(x, x.shape[2], self.sizes[1])

    def tokens(self, x: Array, num_heads: int) -> Array:
        """[B, blocks, K, G * size, H] -> [B, T, N, H]."""
        B, number, K, rows, H = x.shape
        group = num_heads // K
        x = x.reshape(B, number, K, group, rows // group, H).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(B, -1, num_heads, H)[:, : self.num_tokens]

    def _cut(self, x: Array, num_kv_heads: int, size: int) -> Array:
        B, _, N, H = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        x = x.reshape(B, -1, size, num_kv_heads, N // num_kv_heads, H).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(B, x.shape[1], num_kv_heads, -1, H)
