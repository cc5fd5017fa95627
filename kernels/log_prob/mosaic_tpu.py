"""Pallas TPU implementation: the online sums of each token over vocabulary tiles, and dz of each tile; any float dtype.

A step multiplies block_m tokens with block_n vocabulary entries over the whole of D; what it reduces to stays in
vector memory until the vocabulary has passed by. The head is read once for every block_m tokens, 2 block_m operations
a pair of bytes in bfloat16: block_m is as large as memory allows. ``tiled`` has what surrounds the two kernels.

Not run on hardware: run in the interpreters, and lowered for TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import interpret
from kernels.log_prob import tiled
from kernels.token_stats import TokenSums

Array = jax.Array

# Candidates for tuning, by keyword; the first runs where nothing is recorded.
TILES = (
    {"block_m": 512, "block_n": 512},
    {"block_m": 256, "block_n": 512},
    {"block_m": 512, "block_n": 1024},
    {"block_m": 1024, "block_n": 512},
)

LANES = 128
LOWEST = -1e30  # stands for the maximum of nothing: finite, so that 0 times a distance from it is 0
VMEM_LIMIT_BYTES = 2**26


def refuses(*, hidden: int, **_: Any) -> str | None:
    """Why these shapes are not supported, or None."""
    return f"the hidden size {hidden} is not a multiple of {LANES}" if hidden % LANES else None


def _sums(hidden: Array, head: Array, scale: Array, *, block_m: int, block_n: int) -> TokenSums:
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    kernel = functools.partial(_sums_kernel, vocabulary=vocabulary)
    shape = jax.ShapeDtypeStruct((tokens, LANES), jnp.float32)
    out = pl.BlockSpec((block_m, LANES), lambda row, tile: (row, 0))
    scratch = [pltpu.VMEM((4, block_m, LANES), jnp.float32)]
    found = _call(kernel, hidden, head, scale[:, None], shape, out, block_m, block_n, scratch)
    m, l, a, s = found[:, :4].T
    return TokenSums(m, l, a, s, jnp.full((tokens,), vocabulary, jnp.float32), jnp.zeros((tokens, 0), jnp.float32))


def _sums_kernel(hidden_ref: Any, head_ref: Any, scale_ref: Any, out_ref: Any, sums_ref: Any, vocabulary: int) -> None:
    tile, block_n = pl.program_id(1), head_ref.shape[0]

    @pl.when(tile == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)
        sums_ref[0] = jnp.full(sums_ref.shape[1:], LOWEST, jnp.float32)

    logits = _logits(hidden_ref, head_ref, scale_ref)
    valid = tile * block_n + lax.broadcasted_iota(jnp.int32, logits.shape, 1) < vocabulary
    if vocabulary % block_n:  # what lies beyond the head is undefined, perhaps NaN
        logits = jnp.where(valid, logits, LOWEST)
    maximum, exponentials, weighted, shifted = (sums_ref[index][:, :1] for index in range(4))
    largest = jnp.maximum(maximum, logits.max(axis=1, keepdims=True))
    delta = maximum - largest
    rescaled = jnp.exp(delta)
    shift = logits - largest
    exponential = jnp.exp(shift)
    if vocabulary % block_n:  # a column outside has exponential 0
        shift = jnp.where(valid, shift, 0)
    seen = (tile * block_n).astype(jnp.float32)
    sums = (
        largest,
        rescaled * exponentials + exponential.sum(axis=1, keepdims=True),
        rescaled * (weighted + delta * exponentials) + (shift * exponential).sum(axis=1, keepdims=True),
        shifted + delta * seen + shift.sum(axis=1, keepdims=True),
    )
    for index, each in enumerate(sums):
        sums_ref[index] = jnp.broadcast_to(each, sums_ref.shape[1:])

    @pl.when(tile == pl.num_programs(1) - 1)
    def _finish() -> None:
        lane = lax.broadcasted_iota(jnp.int32, out_ref.shape, 1)
        found = jnp.broadcast_to(sums[0], out_ref.shape)
        for index in range(1, 4):
            found = jnp.where(lane == index, sums[index], found)
        out_ref[...] = found


def _dense(hidden: Array, head: Array, rows: Array, *, block_m: int, block_n: int) -> Array:
    shape = jax.ShapeDtypeStruct((hidden.shape[0], head.shape[0]), hidden.dtype)
    out = pl.BlockSpec((block_m, block_n), lambda row, tile: (row, tile))
    return _call(_dense_kernel, hidden, head, rows.T, shape, out, block_m, block_n, [])


def _dense_kernel(hidden_ref: Any, head_ref: Any, rows_ref: Any, out_ref: Any) -> None:
    factor, lse, a, b, c = (rows_ref[:, index : index + 1] for index in range(5))
    log_p = _logits(hidden_ref, head_ref, factor) - lse
    out_ref[...] = ((a - b * log_p) * jnp.exp(log_p) - c).astype(out_ref.dtype)


def _logits(hidden_ref: Any, head_ref: Any, scale_ref: Any) -> Array:
    # In float32 the default of the hardware would round the inputs to bfloat16.
    precision = lax.Precision.HIGHEST if hidden_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (1,)), ((), ()))
    product = lax.dot_general(
        hidden_ref[...], head_ref[...], dimensions, precision=precision, preferred_element_type=jnp.float32
    )
    return product * scale_ref[...]


def _call(
    kernel: Any,
    hidden: Array,
    head: Array,
    rows: Array,
    shape: jax.ShapeDtypeStruct,
    out: pl.BlockSpec,
    block_m: int,
    block_n: int,
    scratch: list,
) -> Array:
    """kernel over all tiles of the vocabulary for one block of tokens after the other; rows [N, R]."""
    return pl.pallas_call(
        kernel,
        out_shape=shape,
        grid=(pl.cdiv(hidden.shape[0], block_m), pl.cdiv(head.shape[0], block_n)),
        in_specs=[
            pl.BlockSpec((block_m, hidden.shape[1]), lambda row, tile: (row, 0)),
            pl.BlockSpec((block_n, hidden.shape[1]), lambda row, tile: (tile, 0)),
            pl.BlockSpec((block_m, rows.shape[1]), lambda row, tile: (row, 0)),
        ],
        out_specs=out,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=interpret.tpu(),
    )(hidden, head, rows)


forward, backward = tiled.halves(_sums, _dense, TILES[0])
