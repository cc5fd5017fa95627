"""TPU kernel: eight rows in VMEM, read once; the recurrence in log2(T) doubling steps along the lanes.

Each step rolls the pairs (b, c) by twice the distance of the one before it (Hillis & Steele 1986). Bound by memory: 24
bytes a token, 28 with groups. Checked in the interpreter and lowered for TPU in the tests; not run on hardware.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import interpret
from kernels.advantage.terms import Advantages, Moments, advantages, by_group, handed, moments, structure

Array = jax.Array

LANES = 128
SUBLANES = 8  # rows of a block, the least there can be; more would only take memory
MOST_TOKENS = 32_768  # of a row: the six arrays of a block and the next, and the scan's temporaries, are 16 MB
MOST_GROUPS = 2048  # three vectors for every 128
TILES = ({},)


def refuses(rows: int, tokens: int, num_groups: int = 0) -> str | None:
    """Why these shapes are not supported, or None."""
    if num_groups > MOST_GROUPS:
        return f"there must be at most {MOST_GROUPS} groups, got {num_groups}"
    if tokens % LANES or tokens > MOST_TOKENS:
        return f"tokens of a row must be a multiple of {LANES} and at most {MOST_TOKENS}, got {tokens}"
    return None


def gae(
    rewards: Array,
    values: Array | None,
    act: Array,
    segment: Array,
    gamma: Array,
    lam: Array,
    group: Array | None = None,
    num_groups: int = 0,
) -> Advantages:
    """As ``recurrent.gae``."""
    rows, tokens = rewards.shape
    widths = [tokens] * 2 + [1] * 3 + [-(-num_groups // LANES) * LANES] * (3 if num_groups else 0)
    blocks = [pl.BlockSpec((SUBLANES, width), lambda number: (number, 0)) for width in widths]
    inputs = [each for each in (rewards, act, segment, values, group) if each is not None]
    advantage, target, *measured = pl.pallas_call(
        functools.partial(_rows, has_values=values is not None, num_groups=num_groups),
        out_shape=[jax.ShapeDtypeStruct((rows, width), jnp.float32) for width in widths],
        grid=(-(-rows // SUBLANES),),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[blocks[0]] * len(inputs)],
        out_specs=blocks,
        interpret=interpret.tpu(),
    )(jnp.stack([gamma, lam]).astype(jnp.float32), *inputs)
    groups = Moments(*(each[:, :num_groups] for each in measured[3:])).merged(0) if num_groups else None
    return Advantages(advantage, target, Moments(*(each[:, 0] for each in measured[:3])), groups)


def _rows(discounts, rewards, act, segment, *rest, has_values: bool, num_groups: int) -> None:
    values, rest = (rest[0][...], rest[1:]) if has_values else (0.0, rest)
    group, rest = (rest[0][...], rest[1:]) if num_groups else (None, rest)
    advantage, target, count, mean, spread, *of_groups = rest
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
    total = functools.partial(jnp.sum, axis=1, keepdims=True)
    count[...], mean[...], spread[...] = moments(a, jnp.where(action, 1.0, 0.0), total)
    if group is not None:
        shape = of_groups[0].shape
        place = lax.broadcasted_iota(jnp.int32, shape, 1)
        table = by_group(Moments(*[jnp.zeros(shape)] * 3), a, action, group, num_groups, place, total)
        for ref, found in zip(of_groups, table, strict=True):
            ref[...] = found
