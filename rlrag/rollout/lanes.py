"""Decoding on copies of pages: a lane keeps what its stream has cached, from round to round, as attention wants it.

Where attention over pages is slow (CPU) this is what a burst does. A lane takes its copy when a stream enters it; a new
token is written to both, the copy and the stream's page.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlrag.model.architecture import Architecture
from rlrag.model.attention import MASKED
from rlrag.model.transformer import Mix
from rlrag.rollout import cache as kv
from rlrag.rollout.cache import TILE, Cache


def enter(cache: Cache, fresh: jax.Array, num_fresh: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """Streams that are new to their lanes: the first `num_fresh` of fresh [B]. table [B, n]."""

    def one(i: jax.Array, cache: Cache) -> Cache:
        return take_up(cache, fresh[i], table[fresh[i]], page_size)

    return jax.lax.fori_loop(0, num_fresh, one, cache)


def mixer(
    cache: Cache, table: jax.Array, position: jax.Array, live: jax.Array, page_size: int, a: Architecture
) -> tuple[Mix, Callable[[], Cache]]:
    """The `mix` of one decode step, and what it makes of the cache; arguments as in paged.mixer."""
    pages, copies = [list(cache.keys), list(cache.values)], [list(cache.lane_keys), list(cache.lane_values)]
    index = kv.live_index(table, position, live, page_size, pages[0][0].shape[1])
    target = jnp.where(live, position, copies[1][0].shape[0] * TILE)

    def mix(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for store, new in zip(pages, (k, v)):
            store[number] = kv.scatter(store[number], index, new)
        keys, values = write(copies[0][number], copies[1][number], target, k[:, 0], v[:, 0])
        copies[0][number], copies[1][number] = keys, values
        window = a.window if a.local[number] else None
        return attend(q[:, 0], keys, values, position, live, window, a.attention_scale or None)[:, None]

    return mix, lambda: Cache(*map(tuple, (*pages, *copies)))


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, position: jax.Array, live: jax.Array,
    window: int | None = None, scale: float | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention of one token a lane, tile after tile (Milakov and Gimelshein 2018, arXiv 1805.02867), in
    float32; tiles that no live lane sees are not read.

    query [B, N, H] of tokens at position [B], which see those up to it, the last `window` of them where there is one;
    key [n, B, K, H, TILE]; value [n, B, K, TILE, H]; live [B]: of other lanes the result means nothing -> [B, N, H].
    scale of the scores; None: H^-0.5.

    Both products are sums of products, not matrix products: with a query or two to a key, XLA for CPU runs those at a
    third of the speed of memory in one layout, from some hundred tokens on at a thirtieth in another (docs/LOG.md).
    """
    B, N, H = query.shape
    K = key.shape[2]
    q = (query * (scale or H**-0.5)).reshape(B, K, N // K, H, 1).astype(jnp.float32)
    first = jnp.maximum(position - window + 1, 0) if window else jnp.zeros_like(position)
    begin = jnp.min(jnp.where(live, first, key.shape[0] * TILE)) // TILE
    end = jnp.max(jnp.where(live, position, -1)) // TILE + 1

    def tile(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, total, out = carry
        at = i * TILE + jnp.arange(TILE)
        seen = (at <= position[:, None]) & (at >= first[:, None])
        scores = jnp.sum(q * of_tile(key, i), -2)  # [B, K, G, TILE]
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new = jnp.maximum(largest, jnp.max(scores, -1, keepdims=True))
        weights, scaled = jnp.exp(scores - new), jnp.exp(largest - new)
        out = out * scaled + jnp.sum(weights[..., None] * of_tile(value, i), -2)
        return new, total * scaled + jnp.sum(weights, -1, keepdims=True), out

    empty = jnp.full((B, K, N // K, 1), MASKED), jnp.zeros((B, K, N // K, 1)), jnp.zeros((B, K, N // K, H))
    _, total, out = jax.lax.fori_loop(begin, end, tile, empty)
    return (out / jnp.maximum(total, 1e-30)).astype(query.dtype).reshape(B, N, H)


def of_tile(lanes: jax.Array, i: jax.Array) -> jax.Array:
    """Tile i, for every query of a group: [B, K, 1, ...] float32."""
    return jax.lax.dynamic_index_in_dim(lanes, i, 0, keepdims=False)[:, :, None].astype(jnp.float32)


def take_up(cache: Cache, lane: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """The cache with the pages of the stream that table [n] names copied into a lane."""
    num_tiles = cache.lane_values[0].shape[0]

    def tiles(store: jax.Array) -> jax.Array:
        """[n, 1, K, TILE, H]"""
        pages = kv.gather(store, table[None], page_size)[:, 0]  # [K, S, H]
        K, S, H = pages.shape
        pages = jnp.pad(pages, ((0, 0), (0, num_tiles * TILE - S), (0, 0)))
        return pages.reshape(K, num_tiles, 1, TILE, H).transpose(1, 2, 0, 3, 4)

    def copied(lanes: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(lanes, new, (0, lane, 0, 0, 0))

    return cache._replace(
        lane_keys=tuple(copied(own, tiles(store).swapaxes(3, 4)) for own, store in zip(cache.lane_keys, cache.keys)),
        lane_values=tuple(copied(own, tiles(store)) for own, store in zip(cache.lane_values, cache.values)),
    )


def write(
    keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write key and value [B, K, H] of one token a lane at positions [B]; one past the end is dropped."""
    rows, tile, place = jnp.arange(len(positions)), positions // TILE, positions % TILE
    keys = keys.at[tile, rows, :, :, place].set(key.astype(keys.dtype), mode="drop", unique_indices=True)
    return keys, values.at[tile, rows, :, place].set(value.astype(values.dtype), mode="drop", unique_indices=True)
