"""Pallas Mosaic GPU implementation for Hopper, bfloat16: two epilogues of one product (``hopper_product``).

- forward: four of the five sums of each token (``kernels.token_stats``; ``tiled`` has the fifth) stay in registers
  from one tile of the vocabulary to the next. They are kept in powers of two: a logit costs five instructions and
  one exp2.
- backward: dz of each tile, through shared memory to a scratch of one block of the vocabulary; ``tiled`` says why the
  two products that follow are the compiler's.

Per tile of 256 x 128 logits a multiprocessor needs 16 D clocks for the product and about 2,100 for the exp2 (16 a
clock), which do not overlap where both multiplying warpgroups come to the end of a tile together. The prediction of
forward and backward against their bare products (8 N D V operations, half of them here) is therefore 1.07 at D = 896,
1.03 at 2048 and 1.02 at 4096, times what this product is slower than the vendor's.

Not run on hardware: run in the GPU interpreter with its race detector, and lowered for CUDA.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import token_stats as monoid
from kernels.log_prob import hopper_product, tiled
from kernels.log_prob.hopper_product import BLOCK_K, COMPUTE, SWIZZLE, Places
from kernels.token_stats import TokenSums

Array = jax.Array

# Candidates for tuning, by keyword; the first runs where nothing is recorded.
TILES = (
    {"block_m": 128, "block_n": 128, "stages": 3},
    {"block_m": 64, "block_n": 256, "stages": 3},
    {"block_m": 128, "block_n": 128, "stages": 2},
    {"block_m": 64, "block_n": 128, "stages": 5},
)

SLICE = 64  # columns that the epilogue computes at once, so that it needs few registers beside the logits
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # stands for the maximum of nothing: finite, so that 0 times a distance from it is 0


def refuses(*, hidden: int, dtype: Any = jnp.bfloat16, **_: Any) -> str | None:
    """Why these shapes are not supported, or None."""
    if dtype != jnp.bfloat16:
        return f"hidden and head are {jnp.dtype(dtype).name}, and it multiplies bfloat16"
    return f"the hidden size {hidden} is not a multiple of {BLOCK_K}" if hidden % BLOCK_K else None


def _sums(hidden: Array, head: Array, scale: Array, *, block_m: int, block_n: int, stages: int) -> TokenSums:
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    # A bulk copy starts at a multiple of the 8 rows of a swizzled tile, and a tile lies inside the head.
    head = tiled.pad_to(head, 8 if vocabulary > block_n else block_n, 0)
    hidden = tiled.pad_to(hidden, COMPUTE * block_m, 0)
    rows = tiled.pad_to(scale[None] * LOG2_E, COMPUTE * block_m, 1)
    cut = hopper_product.tiling(hidden.shape[0], vocabulary, block_m, block_n, stages)
    num_whole = vocabulary // block_n

    def kernel(hidden_ref: Any, head_ref: Any, rows_ref: Any, out_ref: Any, places: Places) -> None:
        def compute(row: Array, split: Array, first: Array, last: Array, logits: Any) -> None:
            group = lax.axis_index("warpgroup")
            tokens = _tokens(row, block_m)
            (factor,) = hopper_product.row_numbers(rows_ref, tokens, places)

            def whole(tile: Array, sums: tuple) -> tuple:
                return _add(sums, logits(tile), factor, (tile - first) * block_n, None)

            def partly(tile: Array, sums: tuple) -> tuple:
                start = cut.start(tile, head_ref.shape[0])
                inside = (tile * block_n - start, vocabulary - start)
                return _add(sums, logits(tile), factor, (tile - first) * block_n, inside)

            zeros = jnp.zeros((block_m,), jnp.float32)
            sums = (jnp.full((block_m,), LOWEST, jnp.float32), zeros, zeros, zeros)
            # Only the last tile of all can overlap the one before it or reach into padding.
            sums = lax.fori_loop(first, jnp.minimum(last, num_whole), whole, sums)
            sums = lax.fori_loop(jnp.minimum(last, num_whole), last, partly, sums)
            for index, each in enumerate(sums):
                places.out[group, index] = each if index == 1 else each / LOG2_E
            plgpu.commit_smem()
            for index in range(4):
                plgpu.copy_smem_to_gmem(places.out.at[group, index], out_ref.at[split, index, tokens])
            plgpu.wait_smem_to_gmem(0)

        hopper_product.program(cut, hidden_ref, head_ref, places, compute)

    shape = jax.ShapeDtypeStruct((cut.splits, 4, hidden.shape[0]), jnp.float32)
    out = plgpu.SMEM((COMPUTE, 4, block_m), jnp.float32)
    parts = hopper_product.call(kernel, cut, shape, hidden.dtype, 1, out)(hidden, head, rows)
    edges = [min(vocabulary, cut.edge(split) * block_n) for split in range(cut.splits + 1)]
    counts = jnp.asarray([float(end - start) for start, end in itertools.pairwise(edges)], jnp.float32)
    m, l, a, s = (parts[:, index, :tokens] for index in range(4))
    counts = jnp.broadcast_to(counts[:, None], m.shape)
    return monoid.combine_along(TokenSums(m, l, a, s, counts, jnp.zeros((*m.shape, 0), jnp.float32)))


def _add(sums: tuple, logits: Array, factor: Array, count: Array, inside: tuple[Array, Array] | None) -> tuple:
    """The sums (m, l, a, s), in powers of two, of the logits seen before and those of a tile.

    Args:
      logits: [block_m, block_n] before the temperature.
      factor: [block_m] log2(e) / temperature.
      count: how many logits have been seen before.
      inside: the columns of the tile that count are from the first number to before the second; None: all.
    """
    valid = None
    if inside is not None:
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        valid = (column >= inside[0]) & (column < inside[1])
        logits = jnp.where(valid, logits, LOWEST)
    maximum, exponentials, weighted, shifted = sums
    largest = jnp.maximum(maximum, logits.max(axis=1) * factor)
    delta = maximum - largest
    rescaled = jnp.exp2(delta)
    weighted = rescaled * (weighted + delta * exponentials)
    shifted = shifted + delta * count.astype(jnp.float32)
    exponentials = rescaled * exponentials
    for columns in _slices(logits.shape[1]):
        part = logits[:, columns]
        shift = part * _across(factor, part) - _across(largest, part)
        exponential = jnp.exp2(shift)
        if valid is not None:  # a column outside has exponential 0
            shift = jnp.where(valid[:, columns], shift, 0)
        exponentials += exponential.sum(axis=1)
        weighted += (shift * exponential).sum(axis=1)
        shifted += shift.sum(axis=1)
    return largest, exponentials, weighted, shifted


def _dense(hidden: Array, head: Array, rows: Array, *, block_m: int, block_n: int, stages: int) -> Array:
    tokens, width = hidden.shape[0], head.shape[0]
    hidden = tiled.pad_to(hidden, COMPUTE * block_m, 0)
    scale, lse, a, b, c = rows
    rows = tiled.pad_to(jnp.stack([scale * LOG2_E, lse * LOG2_E, a, b / LOG2_E, c]), COMPUTE * block_m, 1)
    cut = hopper_product.tiling(hidden.shape[0], width, block_m, block_n, stages)

    def kernel(hidden_ref: Any, head_ref: Any, rows_ref: Any, out_ref: Any, places: Places) -> None:
        def compute(row: Array, split: Array, first: Array, last: Array, logits: Any) -> None:
            group = lax.axis_index("warpgroup")
            tokens = _tokens(row, block_m)
            numbers = hopper_product.row_numbers(rows_ref, tokens, places)

            def step(tile: Array, _: None) -> None:
                found = logits(tile)
                slices = _slices(block_n)
                for index, columns in enumerate(slices):
                    part = found[:, columns]
                    factor, lse, a, b, c = (_across(each, part) for each in numbers)
                    log_p = part * factor - lse
                    dz = (a - b * log_p) * jnp.exp2(log_p) - c
                    place = places.out.at[group, lax.rem((tile - first) * len(slices) + index, 2)]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copy before the last has left this place
                    place[...] = dz.astype(out_ref.dtype)
                    plgpu.commit_smem()
                    to = pl.ds(tile * block_n + columns.start, SLICE)
                    plgpu.copy_smem_to_gmem(place, out_ref.at[tokens, to])

            lax.fori_loop(first, last, step, None)
            plgpu.wait_smem_to_gmem(0)

        hopper_product.program(cut, hidden_ref, head_ref, places, compute)

    shape = jax.ShapeDtypeStruct((hidden.shape[0], width), hidden.dtype)
    out = plgpu.SMEM((COMPUTE, 2, block_m, SLICE), hidden.dtype, transforms=SWIZZLE)
    return hopper_product.call(kernel, cut, shape, hidden.dtype, 5, out)(hidden, head, rows)[:tokens]


def _tokens(row: Array, block_m: int) -> Any:
    """The tokens of a warpgroup."""
    return pl.ds((row * COMPUTE + lax.axis_index("warpgroup")) * block_m, block_m)


def _slices(width: int) -> list[slice]:
    return [slice(start, start + SLICE) for start in range(0, width, SLICE)]


def _across(numbers: Array, part: Array) -> Array:
    """[block_m] as [block_m, columns]."""
    return lax.broadcast_in_dim(numbers, part.shape, (0,))


forward, backward = tiled.halves(_sums, _dense, TILES[0])
