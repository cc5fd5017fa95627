"""Hopper kernel: a warpgroup a row walks backwards over chunks of tokens; each is read once and leaves as advantages.

Inside a chunk the recurrence is solved in log2(tokens) doubling steps (Hillis & Steele 1986), each of which reads the
pairs (b, c) of later tokens from shared memory; what a chunk hands to the one before it is one number. Moments are
taken of each chunk in registers and merged; those of groups into a table that lies over the threads, of which every
row writes one. Bound by memory: 24 bytes a token, 28 with groups. Checked in the interpreter and lowered
for CUDA in the tests; not run on hardware.

Tiles are looked up as "advantage", by rows and tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import interpret, tiles
from kernels.advantage.terms import Advantages, Moments, advantages, by_group, handed, moments, structure

Array = jax.Array

LANES = 128  # threads of a warpgroup; a chunk is a multiple
TILES = tuple({"chunk": chunk} for chunk in (256, 512, 1024, 2048))
DEFAULT = {"chunk": 1024}
MOST_GROUPS = 2048  # three registers of a thread for every 128


def refuses(rows: int, tokens: int, num_groups: int = 0) -> str | None:
    """Why these shapes are not supported, or None."""
    if num_groups > MOST_GROUPS:
        return f"there must be at most {MOST_GROUPS} groups, got {num_groups}"
    return None if tokens % LANES == 0 else f"tokens of a row must be a multiple of {LANES}, got {tokens}"


def gae(
    rewards: Array,
    values: Array | None,
    act: Array,
    segment: Array,
    gamma: Array,
    lam: Array,
    group: Array | None = None,
    num_groups: int = 0,
    tile: dict[str, int] | None = None,
) -> Advantages:
    """As ``recurrent.gae``."""
    rows, tokens = rewards.shape
    tile = tile or DEFAULT | tiles.lookup("advantage", tiles.device_kind(), rows=rows, tokens=tokens)
    chunk = math.gcd(tokens, tile["chunk"])
    buffer = plgpu.SMEM((2 * chunk,), jnp.float32)
    places = -(-num_groups // LANES) * LANES
    per_token, per_row, per_group = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, tokens), (rows,), (rows, places))
    )
    inputs = [each for each in (rewards, act, segment, values, group) if each is not None]
    advantage, target, *measured = plgpu.kernel(
        functools.partial(_row, chunk=chunk, has_values=values is not None, num_groups=num_groups),
        out_type=(*[per_token] * 2, *[per_row] * 3, *[per_group] * (3 if num_groups else 0)),
        grid=(rows,),
        grid_names=("row",),
        scratch_types=(buffer, buffer, plgpu.SMEM((2 * chunk,), jnp.int32)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret.gpu(),
    )(*inputs, jnp.stack([gamma, lam]).astype(jnp.float32))
    groups = Moments(*(each[:, :num_groups] for each in measured[3:])).merged(0) if num_groups else None
    return Advantages(advantage, target, Moments(*measured[:3]), groups)


def _row(rewards, act, segment, *rest, chunk: int, has_values: bool, num_groups: int) -> None:
    values, rest = (rest[0], rest[1:]) if has_values else (None, rest)
    group, rest = (rest[0], rest[1:]) if num_groups else (None, rest)
    discounts, advantage, target, count, mean, spread, *of_groups, b_of, c_of, segment_of = rest
    row = lax.axis_index("row")
    gamma, lam = discounts[0], discounts[1]
    num_chunks = rewards.shape[1] // chunk
    behind_chunk = pl.ds(chunk, chunk)  # the upper half of a buffer: what later tokens are to this chunk

    def later(buffer, distance: int) -> Array:
        return _single(buffer[pl.ds(distance, chunk)])

    def step(number: Array, carry: tuple) -> tuple:
        handed_on, segment_behind, total, table = carry
        here = pl.ds((num_chunks - 1 - number) * chunk, chunk)
        reward, acts, segments = (_single(each[row, here]) for each in (rewards, act, segment))
        value = 0.0 if values is None else _single(values[row, here])
        segment_of[pl.ds(0, chunk)] = segments
        segment_of[behind_chunk] = jnp.full(chunk, segment_behind)
        action, continues = structure(acts, segments, later(segment_of, 1))
        b, c = handed(reward, value, action, continues, gamma, lam)
        b_of[behind_chunk], c_of[behind_chunk] = jnp.zeros(chunk), jnp.ones(chunk)
        distance = 1
        while distance < chunk:
            b_of[pl.ds(0, chunk)], c_of[pl.ds(0, chunk)] = b, c
            b, c = b + c * later(b_of, distance), c * later(c_of, distance)
            distance *= 2
        b_of[pl.ds(0, chunk)], b_of[behind_chunk] = b + c * handed_on, jnp.full(chunk, handed_on)
        a, targets = advantages(reward, value, action, continues, later(b_of, 1))
        advantage[row, here], target[row, here] = a, targets

        total = total.joined(moments(a, jnp.where(action, 1.0, 0.0)))
        if group is not None:
            place = lax.broadcasted_iota(jnp.int32, table.count.shape, 0)
            table = by_group(table, a, action, _single(group[row, here]), num_groups, place)
        return b_of[0], segment_of[0], total, table

    zero = jnp.float32(0)
    table = Moments(*(jnp.zeros(each.shape[1]) for each in of_groups)) if of_groups else None
    start = zero, jnp.int32(0), Moments(zero, zero, zero), table
    total, table = lax.fori_loop(0, num_chunks, step, start)[2:]
    count[row], mean[row], spread[row] = total
    for ref, found in zip(of_groups, table or (), strict=True):
        ref[row, :] = found


def _single(values: Array) -> Array:
    """One element a thread at a time: a vector load from an odd place would not be aligned.

    The interpreter of JAX 0.10.2 knows no layouts.
    """
    return values if interpret.active() else plgpu.layout_cast(values, plgpu.Layout.WG_STRIDED(values.shape, 1))
