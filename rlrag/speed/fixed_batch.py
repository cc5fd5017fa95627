"""A plain sampler without continuous batching: what the engine is held against.

The same packed weights, model functions, attention and sampling as the engine's, and the same statistics of every
token. A batch of episodes is played from its first turn to its last: one prefill and one `while_loop` a turn, which
runs until all of the batch have finished it; then the next batch. The cache is contiguous and grows between turns, in
steps of `BUCKET` tokens, so that short batches do not pay for the longest. A document is there at once: no search is
waited for.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlrag.model.architecture import Architecture
from rlrag.model.attention import attend, views
from rlrag.model.decoding import WHOLE, DecodeWeights
from rlrag.model.transformer import extend, vocabulary_logits
from rlrag.rollout import lanes
from rlrag.rollout.cache import TILE
from rlrag.rollout.sampling import Controls, sample
from rlrag.speed.workload import Turn

BUCKET = 256  # tokens by which the cache grows: a multiple of TILE
CHUNK = 64  # whose multiples what is read is padded to


class Cache(NamedTuple):
    """Per layer [K, B, S, H]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Tiled(NamedTuple):
    """Per layer and tile."""

    keys: tuple[tuple[jax.Array, ...], ...]  # [B, K, H, TILE]
    values: tuple[tuple[jax.Array, ...], ...]  # [B, K, TILE, H]


class Sampled(NamedTuple):
    """What a turn returns: as the engine's outbox, entries past a row's length mean nothing."""

    tokens: jax.Array  # int [B, N]
    logp: jax.Array  # float [B, N], and so the rest
    entropy: jax.Array
    certainty: jax.Array
    margin: jax.Array
    steps: jax.Array  # int []


def up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def play(
    a: Architecture, weights: DecodeWeights, episodes: Sequence[Sequence[Turn]], batch: int, root: jax.Array
) -> tuple[float, int, int]:
    """Seconds, tokens sampled, and lane steps paid, over batches of `batch` episodes in order."""
    begin, tokens, lane_steps = time.perf_counter(), 0, 0
    for first in range(0, len(episodes), batch):
        got, steps = play_batch(a, weights, episodes[first : first + batch], batch, root)
        tokens, lane_steps = tokens + got, lane_steps + steps * batch
    return time.perf_counter() - begin, tokens, lane_steps


def play_batch(
    a: Architecture, weights: DecodeWeights, episodes: Sequence[Sequence[Turn]], batch: int, root: jax.Array
) -> tuple[int, int]:
    """Tokens sampled and steps run. A batch that is not full has idle rows."""
    length, newest = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
    cache, tokens, steps = empty(a, batch, BUCKET), 0, 0
    for number in range(max(len(turns) for turns in episodes)):
        now = [turns[number] if number < len(turns) else None for turns in episodes] + [None] * (batch - len(episodes))
        limit = np.array([turn.length if turn else 0 for turn in now], np.int32)
        # What the turn before sampled last is not cached yet: it is read with what is appended.
        last = [[int(token)] if tokens else [] for token, tokens in zip(newest, length)]
        fresh = [last[row] + list(turn.append) if turn else [] for row, turn in enumerate(now)]
        count = np.array([len(each) for each in fresh], np.int32)
        padded = np.zeros((batch, up(max(int(count.max()) - 1, 1), CHUNK)), np.int32)
        for row, each in enumerate(fresh):
            padded[row, : max(len(each) - 1, 0)] = each[:-1]
            newest[row] = each[-1] if each else newest[row]
        start = np.where(length > 0, length - 1, 0).astype(np.int32)
        room = up(int((start + count + limit).max()), BUCKET)
        cache = grow(cache, max(room, cache.keys[0].shape[2]))
        cache = read(a, weights, cache, padded, start, np.maximum(count - 1, 0))
        position = (start + count - 1).astype(np.int32)  # of the newest token
        key = jax.random.fold_in(root, number)
        longest = up(int(limit.max()), CHUNK)
        cache, out = write(a, longest, weights, cache, newest, np.maximum(position, 0), limit, key)
        found = Sampled(*jax.device_get(out))
        for row in np.flatnonzero(limit):
            newest[row] = found.tokens[row, limit[row] - 1]
            length[row] = position[row] + 1 + limit[row]
        tokens, steps = tokens + int(limit.sum()), steps + int(found.steps)
    return tokens, steps


def empty(a: Architecture, batch: int, room: int) -> Cache:
    shape = (a.num_kv_heads, batch, room, a.head_dim)
    layers = range(a.num_layers)
    return Cache(tuple(jnp.zeros(shape, a.dtype) for _ in layers), tuple(jnp.zeros(shape, a.dtype) for _ in layers))


def grow(cache: Cache, room: int) -> Cache:
    more = room - cache.keys[0].shape[2]
    if more == 0:
        return cache
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), cache)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(a: Architecture, weights: DecodeWeights, cache: Cache, tokens, start, count) -> Cache:
    """Cache tokens [B, C], the first `count` of each row, from position `start` on."""
    room = cache.keys[0].shape[2]
    offset = jnp.arange(tokens.shape[1])
    positions = start[:, None] + offset
    target = jnp.where(offset < count[:, None], positions, room + offset)
    cached = jnp.arange(room)[None]
    seen = views(a, cached <= positions[..., None], positions, cached)
    keys, values = list(cache.keys), list(cache.values)

    def mix(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys[layer], values[layer] = put(keys[layer], target, k), put(values[layer], target, v)
        return attend(q, keys[layer], values[layer], seen[a.local[layer]], a.attention_scale or None)

    extend(weights, a, tokens, positions, mix)
    return Cache(tuple(keys), tuple(values))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def write(a: Architecture, longest: int, weights: DecodeWeights, cache: Cache, token, position, limit, root):
    """Sample up to `limit` tokens in each row, until all rows have theirs."""
    B, room = token.shape[0], cache.keys[0].shape[2]
    numbers = [jnp.zeros((B, longest), dtype) for dtype in (jnp.int32, *[jnp.float32] * 4)]
    uniforms = jax.random.uniform(root, (longest, B))

    def going(state) -> jax.Array:
        return jnp.any(state[0] < limit)

    def step(state):
        number, token, tiled, out = state
        at = (position + number)[:, None]
        target = jnp.where(number < limit, position + number, room)
        keys, values = list(tiled.keys), list(tiled.values)

        def mix(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys[layer], values[layer] = lanes.write(keys[layer], values[layer], target, k[:, 0], v[:, 0])
            window = a.window if a.local[layer] else None
            live = jnp.ones(B, bool)
            return lanes.attend(q[:, 0], keys[layer], values[layer], at[:, 0], live, window, a.attention_scale or None)[
                :, None
            ]

        hidden = extend(weights, a, token[:, None], at, mix)[:, 0]
        new = draw(vocabulary_logits(weights, hidden, WHOLE), uniforms[number])
        out = [jax.lax.dynamic_update_slice_in_dim(old, x[:, None], number, 1) for old, x in zip(out, new)]
        return number + 1, jnp.where(number < limit, new[0], token), Tiled(tuple(keys), tuple(values)), out

    start = jnp.int32(0), token, to_lanes(cache), numbers
    steps, _, tiled, out = jax.lax.while_loop(going, step, start)
    return from_lanes(tiled), Sampled(*out, steps=steps)


def to_lanes(cache: Cache) -> Tiled:
    """As the engine's lanes hold it while they decode."""

    def tiles(each: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(each.swapaxes(0, 1), each.shape[2] // TILE, 2))

    keys = tuple(tuple(tile.swapaxes(2, 3) for tile in tiles(each)) for each in cache.keys)
    return Tiled(keys, tuple(map(tiles, cache.values)))


def from_lanes(tiled: Tiled) -> Cache:
    def whole(tiles: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.concatenate(tiles, 2).swapaxes(0, 1)

    keys = tuple(whole(tuple(tile.swapaxes(2, 3) for tile in layer)) for layer in tiled.keys)
    return Cache(keys, tuple(map(whole, tiled.values)))


def draw(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, ...]:
    """A token a row, as the engine draws it unfiltered at temperature 1, and its statistics; [B] each."""
    B = logits.shape[0]
    plain = Controls(jnp.ones(B), jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.full((B, 0), -1, jnp.int32))
    token, _, *report = sample(logits, uniform, plain)
    return token, *report


def put(store: jax.Array, positions: jax.Array, new: jax.Array) -> jax.Array:
    """Write new [B, C, K, H] at positions [B, C] of a store [K, B, S, H]; a position >= S is dropped."""
    rows = jnp.arange(store.shape[1])[:, None]
    return store.at[:, rows, positions].set(new.transpose(2, 0, 1, 3), mode="drop", unique_indices=True)
