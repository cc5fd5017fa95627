"""Hopper kernel: a warpgroup a row streams it through shared memory once; statistics and token come out of that.

    tile by tile     max, then the sums of the monoid relative to it, merged by ``token_stats.combine``; the largest two
                     logits at every place of a tile; a table of the tiles' sums, in registers
    at the end       the table says in which tile the token is (a greedy one: that of the largest logit); this tile is
                     read again, 3 % of V = 151,936 at the default width, and bisected down to the token

Bisection because Mosaic has no cumulative sum: each step is one masked sum, monotone in the border also in float32.
Copies run ahead by ``stages`` tiles: at one row a multiprocessor that keeps 48 KB of it in flight. Bound by memory:
4 V bytes a row. Checked in the interpreter and lowered for CUDA in the tests; not run on hardware.

Tiles are looked up as "uncertainty", by rows and vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import interpret, tiles
from kernels import token_stats as monoid
from kernels.token_stats import TokenSums
from kernels.uncertainty.bisection import first_above, first_true
from kernels.uncertainty.reference import Drawn

Array = jax.Array

LANES = 128  # threads of a warpgroup, the vocabulary entries of a line of a tile, and the places of the table
VECTOR = 4  # neighbouring entries a thread loads at once
# A tile is ``lines`` x LANES entries, a multiple of VECTOR x LANES.
TILES = tuple({"lines": lines, "stages": stages} for lines in (16, 32, 64) for stages in (2, 3, 4))
DEFAULT = {"lines": 32, "stages": 3}


def refuses(rows: int, vocabulary: int) -> str | None:
    """Why these shapes are not supported, or None."""
    if vocabulary % LANES:
        return f"the vocabulary must be a multiple of {LANES}, got {vocabulary}"
    if not VECTOR * LANES <= vocabulary <= LANES * LANES * min(tile["lines"] for tile in TILES):
        return f"the vocabulary must be between {VECTOR * LANES} and {LANES * LANES * 16}, got {vocabulary}"
    return None


def draw(
    logits: Array,
    uniform: Array,
    scale: Array,
    greedy: Array,
    masked: bool = True,
    tile: dict[str, int] | None = None,
) -> Drawn:
    """As ``reference.draw``."""
    rows, vocabulary = logits.shape
    tile = tile or DEFAULT | tiles.lookup("uncertainty", tiles.device_kind(), rows=rows, vocabulary=vocabulary)
    lines = min(tile["lines"], vocabulary // LANES // VECTOR * VECTOR)
    scalar = jax.ShapeDtypeStruct((rows,), jnp.float32)
    token, *numbers = plgpu.kernel(
        functools.partial(_row, lines=lines, stages=tile["stages"], masked=masked),
        out_type=(jax.ShapeDtypeStruct((rows,), jnp.int32), *[scalar] * 6),
        grid=(rows,),
        grid_names=("row",),
        scratch_types=(
            plgpu.SMEM((tile["stages"], lines, LANES), logits.dtype),
            plgpu.Barrier(num_barriers=tile["stages"]),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret.gpu(),
    )(logits.reshape(rows, vocabulary // LANES, LANES), uniform, scale, greedy.astype(jnp.int32))
    return Drawn(token, *numbers)


def _row(logits, uniform, scale, greedy, token, logit, lse, entropy, certainty, first, second, buffer, arrived, *,
         lines: int, stages: int, masked: bool) -> None:  # fmt: skip
    row = lax.axis_index("row")
    num_lines = logits.shape[1]
    num_tiles = -(-num_lines // lines)
    masked = masked or num_lines % lines > 0
    inverse_temperature = scale[row]
    shape = (lines, LANES)
    place = lax.broadcasted_iota(jnp.int32, (LANES,), 0)
    line = lax.broadcasted_iota(jnp.int32, shape, 0)

    def begin(number: Array) -> Array:
        # The last tile is moved back to end with the row; what an earlier tile has seen of it is masked.
        return jnp.minimum(number * lines, num_lines - lines)

    def fetch(number: Array, slot: Array) -> None:
        source = logits.at[row, pl.ds(begin(number), lines)]
        plgpu.copy_gmem_to_smem(source, buffer.at[slot], arrived.at[slot])

    def load(number: Array, slot: Array) -> Array:
        plgpu.barrier_wait(arrived.at[slot])
        z = buffer[slot].astype(jnp.float32) * inverse_temperature
        return jnp.where(line >= number * lines - begin(number), z, -jnp.inf) if num_lines % lines else z

    def step(number: Array, carry: tuple) -> tuple:
        sums, highest, next_highest, tops, exponentials = carry
        slot = lax.rem(number, stages)
        z = load(number, slot)
        plgpu.commit_smem()  # all threads have read the tile before the copy engine overwrites it

        @pl.when(number + stages < num_tiles)
        def _():
            fetch(number + stages, slot)

        maximum = jnp.max(z)
        shifted = z - jnp.where(maximum > -jnp.inf, maximum, 0.0)
        weights = jnp.exp(shifted)
        total = jnp.sum(weights)
        weighted = jnp.sum(weights * jnp.maximum(shifted, -1e30))
        if masked:
            present = z > -jnp.inf
            shifted_sum = jnp.sum(jnp.where(present, shifted, 0.0))
            count = jnp.sum(jnp.where(present, 1.0, 0.0))
        else:
            shifted_sum, count = jnp.sum(shifted), jnp.float32(lines * LANES)
        tile_sums = TokenSums(maximum, total, weighted, shifted_sum, count, jnp.float32(0))
        here = place == number
        return (
            monoid.combine(sums, tile_sums),
            jnp.maximum(highest, z),
            jnp.maximum(next_highest, jnp.minimum(highest, z)),
            jnp.where(here, maximum, tops),
            jnp.where(here, total, exponentials),
        )

    for number in range(min(stages, num_tiles)):
        fetch(jnp.int32(number), jnp.int32(number))
    zero, none = jnp.float32(0), jnp.float32(-jnp.inf)
    empty = TokenSums(none, zero, zero, zero, zero, zero)
    start = (
        empty,
        *[jnp.full(shape, -jnp.inf)] * 2,
        jnp.full(LANES, -jnp.inf),
        jnp.zeros(LANES),
    )
    sums, highest, next_highest, tops, exponentials = lax.fori_loop(0, num_tiles, step, start)

    maximum = sums.maximum
    offset = jnp.where(maximum > -jnp.inf, maximum, 0.0)
    is_greedy = greedy[row] > 0
    weights = exponentials * jnp.exp(jnp.where(tops > -jnp.inf, tops - offset, 0.0))
    target = uniform[row] * jnp.sum(weights)
    drawn_tile = first_above(weights, place, target, num_tiles, jnp.sum)
    tile = jnp.where(is_greedy, first_true(tops == maximum, place, jnp.max), drawn_tile)
    fetch(tile, jnp.int32(0))
    z = load(tile, jnp.int32(0))
    index = line * LANES + lax.broadcasted_iota(jnp.int32, shape, 1)
    before = jnp.sum(jnp.where(place < tile, weights, 0.0))
    remaining = target - before
    drawn = first_above(jnp.exp(z - offset), index, remaining, lines * LANES, jnp.sum)
    inside = jnp.where(is_greedy, first_true(z == maximum, index, jnp.max), drawn)

    stats = monoid.finish(sums)
    is_first = highest == maximum
    tied = jnp.sum(jnp.where(is_first, 1.0, 0.0)) > 1
    below = jnp.max(jnp.where(is_first, next_highest, highest))
    token[row] = begin(tile) * LANES + inside
    logit[row] = jnp.max(jnp.where(index == inside, z, -jnp.inf))
    lse[row], entropy[row], certainty[row] = stats.lse, stats.entropy, stats.certainty
    first[row], second[row] = maximum, jnp.where(tied, maximum, below)
