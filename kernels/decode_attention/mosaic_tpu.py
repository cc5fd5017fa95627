"""TPU: a grid over slots and their pages, in which the page table tells the pipeline what to load next.

The table and the lengths are prefetched scalars, so that the index map of a block of keys is a page of the slot. The
pipeline loads a block only where its index differs from the one before: pages past a slot's last, and before its
window, are mapped to the nearest live one and cost no load. All kv heads of a page are one block, since heads lead in
the store. JAX's own ragged paged attention wants key and value heads interleaved within a page and is not used.

A turn of the grid costs a few hundred nanoseconds whatever the page's size, so pages of 128 or more suit it best. Not
run on hardware.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import interpret
from kernels.decode_attention.reference import MASKED

Array = jax.Array

ROWS = 8  # sublanes: the queries of a group are padded to them


def refuses(dtype: jnp.dtype, page_size: int, **shape: int) -> str | None:
    rows = 32 // dtype.itemsize  # of a tile in vector memory
    if page_size % rows:
        return f"page_size {page_size} is not a multiple of {rows}, the rows of a {dtype.name} tile on TPU"
    return None


def attend(
    query: Array, keys: Array, values: Array, table: Array, length: Array, *, page_size: int, window: int | None
) -> Array:
    """As ``reference.attend``."""
    B, N, H = query.shape
    K, n = keys.shape[0], table.shape[1]
    group = -(-(N // K) // ROWS) * ROWS
    q = jnp.pad(query.reshape(B, K, N // K, H), ((0, 0), (0, 0), (0, group - N // K), (0, 0)))

    def page(b: Array, i: Array, table: Array, length: Array) -> tuple:
        first, last = live_pages(length[b], page_size, window)
        return 0, table[b * n + jnp.clip(i, first, last)], 0

    def slot(b: Array, i: Array, table: Array, length: Array) -> tuple:
        return b, 0, 0, 0

    own, kv = pl.BlockSpec((None, K, group, H), slot), pl.BlockSpec((K, page_size, H), page)
    out = pl.pallas_call(
        partial(body, page_size=page_size, window=window),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, n),
            in_specs=[own, kv, kv],
            out_specs=own,
            scratch_shapes=[
                pltpu.VMEM((K, group, H), jnp.float32),
                *[pltpu.VMEM((K, group, 128), jnp.float32)] * 2,  # a number a row, in every lane
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret.tpu(),
    )(table.reshape(-1), length, q, keys, values)
    return out[:, :, : N // K].reshape(B, N, H)


def live_pages(length: Array, page_size: int, window: int | None) -> tuple[Array | int, Array]:
    """The first and the last page that a slot sees something of; 0, 0 where it is idle."""
    first = lax.div(jnp.maximum(length - window, 0), page_size) if window else 0
    return first, lax.div(jnp.maximum(length - 1, 0), page_size)


def body(table_ref, length_ref, q_ref, k_ref, v_ref, out_ref, total_ref, most_ref, sums_ref, *, page_size, window):
    """One page of one slot."""
    b, i = pl.program_id(0), pl.program_id(1)
    length = length_ref[b]
    first, last = live_pages(length, page_size, window)

    @pl.when(i == 0)
    def _begin():
        total_ref[...] = jnp.zeros_like(total_ref)
        most_ref[...] = jnp.full_like(most_ref, MASKED)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when((length > 0) & (i >= first) & (i <= last))
    def _attend():
        def seen(shape: tuple[int, ...], dim: int) -> Array:
            position = i * page_size + lax.broadcasted_iota(jnp.int32, shape, dim)
            inside = position < length
            return inside & (position >= length - window) if window else inside

        batched = ((2,), (2,)), ((0,), (0,))
        scores = lax.dot_general(q_ref[...], k_ref[...], batched, preferred_element_type=jnp.float32)  # [K, G, page]
        scores = jnp.where(seen(scores.shape, 2), scores, MASKED)
        most = jnp.maximum(most_ref[...], scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - most[..., :1])
        kept = jnp.exp(most_ref[...] - most)
        value = v_ref[...]
        value = jnp.where(seen(value.shape, 1), value, jnp.zeros_like(value))
        mixed = lax.dot_general(
            weights.astype(value.dtype), value, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )
        total_ref[...] = total_ref[...] * kept[..., :1] + mixed
        most_ref[...] = most
        sums_ref[...] = sums_ref[...] * kept + weights.sum(-1, keepdims=True)

    @pl.when(i == pl.num_programs(1) - 1)
    def _finish():
        sums = sums_ref[...][..., :1]
        out_ref[...] = (total_ref[...] / jnp.where(sums > 0, sums, 1)).astype(out_ref.dtype)
