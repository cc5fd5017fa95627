"""The key/value cache: pages are the store, a contiguous view of the streams in decode lanes is what attention reads.

Where attention over pages is slow (CPU) a lane has a copy of its stream's pages, taken when the stream enters the lane
and kept from round to round; new tokens are written to the copy as they come and to the pages at the end of a burst. A
page table row lists a stream's pages in order; entries past its end are never read, because the causal mask ends before
them, and never written, because writes name positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rlrag.mesh import DATA, MODEL, constrain
from rlrag.model.architecture import Architecture
from rlrag.model.decoding import parts

TILE = 32  # tokens of a lane whose keys lie together


class Cache(NamedTuple):
    """Per layer. In pages heads lead: gathered, they need no transposition. In lanes the keys of `TILE` tokens lie
    together with tokens last, n tiles: XLA for CPU then computes scores at the speed of memory (docs/LOG.md)."""

    keys: tuple[jax.Array, ...]  # [K, P * page, H]
    values: tuple[jax.Array, ...]  # [K, P * page, H]
    lane_keys: tuple[jax.Array, ...]  # [B, K, n, H, TILE] of the streams in decode lanes
    lane_values: tuple[jax.Array, ...]  # [B, K, n * TILE, H]


def empty(a: Architecture, num_pages: int, page_size: int, num_lanes: int, max_tokens: int, num_kv_heads: int = 0) -> Cache:  # fmt: skip # noqa: E501
    """num_kv_heads: over all devices, where some stand several times; 0: the architecture's."""
    K, H = num_kv_heads or a.num_kv_heads, a.head_dim

    def zeros(names: tuple[str, ...], *shape: int) -> tuple[jax.Array, ...]:
        free = [None] * (len(shape) - len(names))
        return tuple(constrain(jnp.zeros(shape, a.dtype), *names, *free) for _ in range(a.num_layers))

    page = ("kv_heads", "pages"), K, num_pages * page_size, H
    lane, tiles = ("pages", "kv_heads"), num_tiles(max_tokens)
    return Cache(
        zeros(*page),
        zeros(*page),
        zeros(lane, num_lanes, K, tiles, H, TILE),
        zeros(lane, num_lanes, K, tiles * TILE, H),
    )


def partitions(a: Architecture, mesh: Mesh) -> Cache:
    """How a cache lies on a `data` x `model` mesh: a PartitionSpec for every array."""
    heads = MODEL if parts(a, mesh.shape[MODEL]).heads > 1 else None
    page, lane = PartitionSpec(heads, DATA), PartitionSpec(DATA, heads)
    return Cache(*[(each,) * a.num_layers for each in (page, page, lane, lane)])


def num_tiles(num_tokens: int) -> int:
    return -(-num_tokens // TILE)


def token_index(table: jax.Array, positions: jax.Array, page_size: int) -> jax.Array:
    """Places in the store of the tokens at `positions` [B, C] of streams with page tables [B, n]."""
    page = jnp.take_along_axis(table, jnp.clip(positions // page_size, 0, table.shape[1] - 1), axis=1)
    return page * page_size + positions % page_size


def gather(store: jax.Array, table: jax.Array, page_size: int) -> jax.Array:
    """The view [K, B, S, H] of the streams with page tables [B, n]; S = n * page_size."""
    K, _, H = store.shape
    B, n = table.shape
    return store.reshape(K, -1, page_size, H)[:, table].reshape(K, B, n * page_size, H)


def scatter(store: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """Write new [B, C, K, H] at places index [B, C]; an index past the end is dropped."""
    flat = new.reshape(-1, *new.shape[2:]).transpose(1, 0, 2).astype(store.dtype)
    return store.at[:, index.reshape(-1)].set(flat, mode="drop", unique_indices=True)


def take_up(cache: Cache, lane: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """The cache with the pages of the stream that table [n] names copied into a lane."""
    tokens = cache.lane_values[0].shape[2]

    def view(store: jax.Array) -> jax.Array:
        pages = gather(store, table[None], page_size)  # [K, 1, S, H]
        return jnp.pad(pages, ((0, 0), (0, 0), (0, tokens - pages.shape[2]), (0, 0))).swapaxes(0, 1)

    def keys(lanes: jax.Array, store: jax.Array) -> jax.Array:
        _, K, tiles, H, _ = lanes.shape
        tiled = view(store).reshape(1, K, tiles, TILE, H).swapaxes(3, 4)
        return jax.lax.dynamic_update_slice(lanes, tiled, (lane, 0, 0, 0, 0))

    def values(lanes: jax.Array, store: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(lanes, view(store), (lane, 0, 0, 0))

    return cache._replace(
        lane_keys=tuple(map(keys, cache.lane_keys, cache.keys)),
        lane_values=tuple(map(values, cache.lane_values, cache.values)),
    )


def write_lanes(
    keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write key and value [B, K, H] of one token a lane at positions [B]; one past the end is dropped."""
    rows, tile, place = jnp.arange(len(positions)), positions // TILE, positions % TILE
    keys = keys.at[rows, :, tile, :, place].set(key.astype(keys.dtype), mode="drop", unique_indices=True)
    return keys, values.at[rows, :, positions].set(value.astype(values.dtype), mode="drop", unique_indices=True)


def read_lanes(keys: jax.Array, values: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key and value [B, C, K, H] of lanes at positions [B, C]; positions past the end repeat the last."""
    rows, at = jnp.arange(len(positions))[:, None], jnp.minimum(positions, values.shape[2] - 1)
    return keys[rows, :, at // TILE, :, at % TILE], values[rows, :, at]
