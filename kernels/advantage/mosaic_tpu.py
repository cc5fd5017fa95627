"""TPU kernel: eight rows in VMEM, read once; the recurrence in log2(T) doubling steps along the lanes.

Each step rolls the pairs (b, c) by twice the distance of the one before it (Hillis & Steele 1986). Bound by memory: 24
bytes a token. Checked in the interpreter and lowered for TPU in the tests; not run on hardware.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import interpret
from kernels.advantage.terms import Advantages, Moments, advantages, handed, structure

Array = jax.Array

LANES = 128
SUBLANES = 8  # rows of a block, the least there can be; more would only take memory
MOST_TOKENS = 32_768  # of a row: the six arrays of a block and the next, and the scan's temporaries, are 16 MB
TILES = ({},)


def refuses(rows: int, tokens: int) -> str | None:
    """Why these shapes are not supported, or None."""
    if tokens % LANES or tokens > MOST_TOKENS:
        return f"tokens of a row must be a multiple of {LANES} and at most {MOST_TOKENS}, got {tokens}"
    return None


def gae(rewards: Array, values: Array | None, act: Array, segment: Array, gamma: Array, lam: Array) -> Advantages:
    """As ``recurrent.gae``."""
    rows, tokens = rewards.shape
    block, column = (pl.BlockSpec((SUBLANES, width), lambda number: (number, 0)) for width in (tokens, 1))
    per_token, per_row = (jax.ShapeDtypeStruct((rows, width), jnp.float32) for width in (tokens, 1))
    inputs = (rewards, act, segment) if values is None else (rewards, act, segment, values)
    advantage, target, *moments = pl.pallas_call(
        functools.partial(_rows, has_values=values is not None),
        out_shape=(*[per_token] * 2, *[per_row] * 3),
        grid=(-(-rows // SUBLANES),),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[block] * len(inputs)],
        out_specs=(*[block] * 2, *[column] * 3),
        interpret=interpret.tpu(),
    )(jnp.stack([gamma, lam]).astype(jnp.float32), *inputs)
    return Advantages(advantage, target, Moments(*(each[:, 0] for each in moments)))


def _rows(discounts, rewards, act, segment, *rest, has_values: bool) -> None:
    values, rest = (rest[0][...], rest[1:]) if has_values else (0.0, rest)
    advantage, target, count, mean, spread = rest
    tokens = rewards.shape[1]
    place = lax.broadcasted_iota(jnp.int32, rewards.shape, 1)

    def later(x: Array, distance: int, behind: float) -> Array:
        return jnp.where(place < tokens - distance, pltpu.roll(x, tokens - distance, 1), behind)

    reward, segments = rewards[...], segment[...]
    action, continues = structure(act[...], segments, later(segments, 1, 0))
    b, c = handed(reward, values, action, continues, discounts[0], discounts[1])
    distance = 1
    while distance < tokens:
        b, c = b + c * later(b, distance, 0.0), c * later(c, distance, 0.0)
        distance *= 2
    a, targets = advantages(reward, values, action, continues, later(b, 1, 0.0))
    advantage[...], target[...] = a, targets
    weight = jnp.where(action, 1.0, 0.0)
    number = weight.sum(1, keepdims=True)
    average = a.sum(1, keepdims=True) / jnp.maximum(number, 1.0)
    count[...], mean[...] = number, average
    spread[...] = (weight * jnp.square(a - average)).sum(1, keepdims=True)
