"""Splash attention (TPU), JAX's block-sparse flash kernel, with one dynamic mask a row. Not run on hardware yet.

Its segment ids say equality alone, which is not a prefix relation; a mask that the data give says everything, and
blocks that it hides are skipped. Such a mask is held dense, T^2 bytes a row, once for all heads. The
kernel's backward pass is reached through its own gradient, which computes the forward pass again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

from kernels.packed_attention.sharded import by_rows
from kernels.packed_attention.visibility import Visibility
from kernels.packed_attention.visibility import visible as written_out

Array = jax.Array

LANES = 128


def refuses(tokens: int, head_dim: int, dtype: jnp.dtype, divided: bool) -> str | None:
    del dtype, divided
    if tokens % LANES or head_dim % LANES:
        return f"rows of {tokens} columns and heads of {head_dim} numbers must be multiples of {LANES}"
    return None


def attend(
    query: Array, key: Array, value: Array, visible: Visibility, rows: tuple[str, ...] = (),
    heads: tuple[str, ...] = (), interpret: bool = False,
) -> Array:  # fmt: skip
    """query [B, T, N, H] (scaled), key and value [B, T, K, H] -> [B, T, N, H]. rows, heads: axes of the mesh that they
    lie over; interpret: run on a CPU, slowly."""
    return _attend(rows, heads, interpret, query, key, value, visible)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(rows, heads, interpret, query, key, value, visible):
    return by_rows(partial(forward, interpret), (query, key, value, visible), rows, heads)


def _attend_forward(rows, heads, interpret, query, key, value, visible):
    out = by_rows(partial(forward, interpret), (query, key, value, visible), rows, heads)
    return out, (query, key, value, visible)


def _attend_backward(rows, heads, interpret, residuals, d_out):
    def backward(query, key, value, visible, d_out):
        return jax.vjp(lambda q, k, v: forward(interpret, q, k, v, visible), query, key, value)[1](d_out)

    return *by_rows(backward, (*residuals, d_out), rows, heads), None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(interpret: bool, query: Array, key: Array, value: Array, visible: Visibility) -> Array:
    tokens = query.shape[1]
    size = next(size for size in (512, 256, LANES) if tokens % size == 0)
    sizes = kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )

    def row(own: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, mask = own
        made = kernel.make_splash_mha(mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        # Under a trace the constructor has made an array of this flag, which the call then branches on.
        made.fwd_mask_info = made.fwd_mask_info._replace(is_dynamic_mask=True)
        out: Any = made(*(each.swapaxes(0, 1) for each in (q, k, v)))
        return out.swapaxes(0, 1)

    return jax.lax.map(row, (query, key, value, written_out(visible)))
