"""Decoding on copies of pages: a lane keeps what its stream has cached, from round to round, as attention wants it.

Where attention over pages is slow (CPU) this is what a burst does. A lane takes its copy when a stream enters it; a new
token is written to both, the copy and the stream's page.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlrag.model.architecture import Architecture
from rlrag.model.attention import MASKED, views
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
    capacity = copies[1][0].shape[2]
    cached = jnp.arange(capacity)[None]
    seen = views(a, (cached <= position[:, None])[:, None], position[:, None], cached)
    target = jnp.where(live, position, capacity)

    def mix(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for store, new in zip(pages, (k, v)):
            store[number] = kv.scatter(store[number], index, new)
        keys, values = write(copies[0][number], copies[1][number], target, k[:, 0], v[:, 0])
        copies[0][number], copies[1][number] = keys, values
        return attend(q[:, 0], keys, values, seen[a.local[number]][:, 0], a.attention_scale or None)[:, None]

    return mix, lambda: Cache(*map(tuple, (*pages, *copies)))


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float | None = None
) -> jax.Array:
    """Softmax attention of one token a lane; scores and softmax in float32.

    query [B, N, H]; key [B, K, n, H, W], tiles of W tokens; value [B, K, n * W, H]; visible [B, n * W] -> [B, N, H].
    scale of the scores; None: H^-0.5.

    Scores are sums of products along tiles and no matrix product: with a query or two to a key, XLA for CPU runs the
    product at a third of the speed of memory in one layout and, from some hundred tokens on, at a thirtieth in the
    other (docs/LOG.md).
    """
    B, N, H = query.shape
    K, num_tiles, _, width = key.shape[1:]
    q = (query * (scale or H**-0.5)).reshape(B, K, N // K, 1, H, 1).astype(jnp.float32)
    scores = jnp.sum(q * key[:, :, None].astype(jnp.float32), -2).reshape(B, K, N // K, num_tiles * width)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    weights = (weights / jnp.sum(weights, -1, keepdims=True)).astype(value.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, value)
    return out.astype(query.dtype).reshape(B, N, H)


def take_up(cache: Cache, lane: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """The cache with the pages of the stream that table [n] names copied into a lane."""
    tokens = cache.lane_values[0].shape[2]

    def view(store: jax.Array) -> jax.Array:
        pages = kv.gather(store, table[None], page_size)  # [K, 1, S, H]
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


def write(
    keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write key and value [B, K, H] of one token a lane at positions [B]; one past the end is dropped."""
    rows, tile, place = jnp.arange(len(positions)), positions // TILE, positions % TILE
    keys = keys.at[rows, :, tile, :, place].set(key.astype(keys.dtype), mode="drop", unique_indices=True)
    return keys, values.at[rows, :, positions].set(value.astype(values.dtype), mode="drop", unique_indices=True)
