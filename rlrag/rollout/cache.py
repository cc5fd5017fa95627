"""The key/value cache: pages are the store; where attention over pages is slow, decode lanes have copies (lanes.py).

A page table row lists a stream's pages in order; entries past its end are never read, because the causal mask ends
before them, and never written, because writes name positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlrag.mesh import constrain
from rlrag.model.architecture import Architecture

TILE = 64  # tokens of all lanes that lie together, and that attention reads at once, of streams up to MOST_TILES of it
MOST_TILES = 16  # a decode step says what it does with each


class Cache(NamedTuple):
    """Per layer. In pages heads lead: gathered, they need no transposition. Lanes are cut into n tiles, so that none is
    read behind the longest stream, each an array of its own, because what is cut out of a larger one is copied first;
    and keys have tokens last: XLA for CPU then computes scores at the speed of memory (docs/LOG.md)."""

    keys: tuple[jax.Array, ...]  # [K, P * page, H]
    values: tuple[jax.Array, ...]  # [K, P * page, H]
    lane_keys: tuple[tuple[jax.Array, ...], ...]  # n times [B, K, H, tile] of the streams in decode lanes
    lane_values: tuple[tuple[jax.Array, ...], ...]  # n times [B, K, tile, H]


def tiles(max_tokens: int) -> tuple[int, int]:
    """How many tiles a lane of so many tokens has, and how many tokens one holds."""
    size = TILE * -(-max_tokens // (TILE * MOST_TILES))
    return -(-max_tokens // size), size


def empty(a: Architecture, num_pages: int, page_size: int, num_lanes: int, max_tokens: int, num_kv_heads: int = 0) -> Cache:  # fmt: skip # noqa: E501
    """num_lanes: 0 where a burst works on the pages. num_kv_heads: over all devices, where some stand several times; 0:
    the architecture's."""
    K, H = num_kv_heads or a.num_kv_heads, a.head_dim

    def zeros(names: tuple[str | None, ...], *shape: int) -> tuple[jax.Array, ...]:
        free = [None] * (len(shape) - len(names))
        return tuple(constrain(jnp.zeros(shape, a.dtype), *names, *free) for _ in range(a.num_layers))

    page = ("kv_heads", "pages"), K, num_pages * page_size, H
    if not num_lanes:
        return Cache(zeros(*page), zeros(*page), (), ())
    number, size = tiles(max_tokens)
    lane = ("pages", "kv_heads"), num_lanes, K

    def cut(*shape: int) -> tuple[tuple[jax.Array, ...], ...]:
        return tuple(zip(*(zeros(*lane, *shape) for _ in range(number))))

    return Cache(zeros(*page), zeros(*page), cut(H, size), cut(size, H))


def token_index(table: jax.Array, positions: jax.Array, page_size: int) -> jax.Array:
    """Places in the store of the tokens at `positions` [B, C] of streams with page tables [B, n]."""
    page = jnp.take_along_axis(table, jnp.clip(positions // page_size, 0, table.shape[1] - 1), axis=1)
    return page * page_size + positions % page_size


def live_index(table: jax.Array, position: jax.Array, live: jax.Array, page_size: int, capacity: int) -> jax.Array:
    """Places [B, 1] in a store of `capacity` tokens of a token a slot, at position [B]; past its end where not live."""
    past = capacity + jnp.arange(len(position))[:, None]
    return jnp.where(live[:, None], token_index(table, position[:, None], page_size), past)


def gather(store: jax.Array, table: jax.Array, page_size: int) -> jax.Array:
    """The view [K, B, S, H] of the streams with page tables [B, n]; S = n * page_size."""
    K, _, H = store.shape
    B, n = table.shape
    return store.reshape(K, -1, page_size, H)[:, table].reshape(K, B, n * page_size, H)


def scatter(store: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """Write new [B, C, K, H] at places index [B, C]; an index past the end is dropped."""
    flat = new.reshape(-1, *new.shape[2:]).transpose(1, 0, 2).astype(store.dtype)
    return store.at[:, index.reshape(-1)].set(flat, mode="drop", unique_indices=True)
