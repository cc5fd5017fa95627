"""TPU kernel: rows whose whole vocabulary is in VMEM, copied there once; every further look at them stays on chip.

    first walk       tile by tile the sums of the monoid, merged by ``token_stats.combine``, the largest two logits at
                     every place of a tile, and a table of the tiles' sums
    second walk      picks from each row the tile in which its token is, which is bisected down to it

Eight rows of V = 151,936 in float32 are 4.9 MB, twice that while the next eight are on their way. Bound by memory:
4 V bytes a row. Checked in the interpreter and lowered for TPU in the tests; not run on hardware.

Tiles are looked up as "uncertainty", by rows and vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import interpret, tiles
from kernels import token_stats as monoid
from kernels.token_stats import TokenSums
from kernels.uncertainty.bisection import first_above, first_true
from kernels.uncertainty.reference import Drawn

Array = jax.Array

LANES = 128  # of a register, and places of the table
SUBLANES = 8  # rows of a block
VMEM_BYTES = 12 * 2**20  # of the 16 MiB a kernel may use on the smallest chips
TILES = tuple({"width": width} for width in (2048, 4096, 8192))
DEFAULT = {"width": 2048}


def refuses(rows: int, vocabulary: int) -> str | None:
    """Why these shapes are not supported, or None."""
    if vocabulary % LANES:
        return f"the vocabulary must be a multiple of {LANES}, got {vocabulary}"
    most = VMEM_BYTES // (2 * 4 * SUBLANES)
    if vocabulary > most:
        return f"{SUBLANES} rows must fit the memory of a core twice: a vocabulary of at most {most}, got {vocabulary}"
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
    column = pl.BlockSpec((SUBLANES, 1), lambda block: (block, 0))
    scalar = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(_rows, width=min(tile["width"], vocabulary), masked=masked),
        out_shape=(jax.ShapeDtypeStruct((rows, 1), jnp.int32), *[scalar] * 6),
        grid=(-(-rows // SUBLANES),),
        in_specs=[pl.BlockSpec((SUBLANES, vocabulary), lambda block: (block, 0)), column, column, column],
        out_specs=(column,) * 7,
        interpret=interpret.tpu(),
    )(logits, uniform[:, None], scale[:, None], greedy[:, None].astype(jnp.int32))
    return Drawn(*(each[:, 0] for each in outputs))


def _rows(logits, uniform, scale, greedy, token, logit, lse, entropy, certainty, first, second, *,
          width: int, masked: bool) -> None:  # fmt: skip
    vocabulary = logits.shape[1]
    num_tiles = -(-vocabulary // width)
    masked = masked or vocabulary % width > 0
    total = functools.partial(jnp.sum, axis=1, keepdims=True)
    greatest = functools.partial(jnp.max, axis=1, keepdims=True)
    place = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    index = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)

    def begin(number: Array) -> Array:
        # The last tile is moved back to end with the row; what an earlier tile has seen of it is masked.
        return jnp.minimum(number * width, vocabulary - width)

    def load(number: Array) -> Array:
        start = pl.multiple_of(begin(number), LANES)
        z = logits[:, pl.ds(start, width)].astype(jnp.float32) * scale[...]
        return jnp.where(index >= number * width - start, z, -jnp.inf) if vocabulary % width else z

    def step(number: Array, carry: tuple) -> tuple:
        sums, highest, next_highest, tops, exponentials = carry
        z = load(number)
        maximum = greatest(z)
        shifted = z - jnp.where(maximum > -jnp.inf, maximum, 0.0)
        weights = jnp.exp(shifted)
        weighted = total(weights * jnp.maximum(shifted, -1e30))
        if masked:
            present = z > -jnp.inf
            shifted, count = jnp.where(present, shifted, 0.0), total(jnp.where(present, 1.0, 0.0))
        else:
            count = jnp.full_like(maximum, width)
        of_tile = TokenSums(maximum, total(weights), weighted, total(shifted), count, jnp.zeros_like(maximum))
        return (
            monoid.combine(sums, of_tile),
            jnp.maximum(highest, z),
            jnp.maximum(next_highest, jnp.minimum(highest, z)),
            jnp.where(place == number, maximum, tops),
            jnp.where(place == number, of_tile.exponentials, exponentials),
        )

    zero, none = jnp.zeros((SUBLANES, 1), jnp.float32), jnp.full((SUBLANES, 1), -jnp.inf)
    lowest = jnp.full((SUBLANES, width), -jnp.inf)
    tables = jnp.full(place.shape, -jnp.inf), jnp.zeros(place.shape)
    start = TokenSums(none, zero, zero, zero, zero, zero), lowest, lowest, *tables
    sums, highest, next_highest, tops, exponentials = lax.fori_loop(0, num_tiles, step, start)

    maximum = sums.maximum
    offset = jnp.where(maximum > -jnp.inf, maximum, 0.0)
    is_greedy = greedy[...] > 0
    weights = exponentials * jnp.exp(jnp.where(tops > -jnp.inf, tops - offset, 0.0))
    target = uniform[...] * total(weights)
    drawn_tile = first_above(weights, place, target, num_tiles, total)
    tile = jnp.where(is_greedy, first_true(tops == maximum, place, greatest), drawn_tile)
    z = lax.fori_loop(0, num_tiles, lambda number, found: jnp.where(tile == number, load(number), found), lowest)
    remaining = target - total(jnp.where(place < tile, weights, 0.0))
    drawn = first_above(jnp.exp(z - offset), index, remaining, width, total)
    inside = jnp.where(is_greedy, first_true(z == maximum, index, greatest), drawn)

    stats = monoid.finish(sums)
    is_first = highest == maximum
    tied = total(jnp.where(is_first, 1.0, 0.0)) > 1
    token[...] = begin(tile) + inside
    logit[...] = greatest(jnp.where(index == inside, z, -jnp.inf))
    lse[...], entropy[...], certainty[...] = stats.lse, stats.entropy, stats.certainty
    first[...] = maximum
    second[...] = jnp.where(tied, maximum, greatest(jnp.where(is_first, next_highest, highest)))
