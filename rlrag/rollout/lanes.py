"""Decoding on copies of pages: a lane keeps what its stream has cached, from round to round, as attention wants it.

Where attention over pages is slow (CPU) this is what a burst does. A lane takes its copy when a stream enters it; a new
token is written to both, the copy and the stream's page.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlrag.model.architecture import Architecture
from rlrag.model.attention import FAR, MASKED
from rlrag.model.transformer import Mix
from rlrag.rollout import cache as kv
from rlrag.rollout.cache import Cache

Tiles = tuple[jax.Array, ...]  # of one layer


class Sums(NamedTuple):
    """Of what a query has read so far, in float32."""

    largest: jax.Array  # [B, K, G, 1] score
    total: jax.Array  # [B, K, G, 1] of exp(score - largest)
    mixed: jax.Array  # [B, K, G, H] values, each times its exponential


def enter(cache: Cache, fresh: jax.Array, num_fresh: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """Streams that are new to their lanes: the first `num_fresh` of fresh [B]. table [B, n]."""

    def one(i: jax.Array, cache: Cache) -> Cache:
        return take_up(cache, fresh[i], table[fresh[i]], page_size)

    return jax.lax.fori_loop(0, num_fresh, one, cache)


def mixer(
    cache: Cache, table: jax.Array, position: jax.Array, live: jax.Array, page_size: int, a: Architecture
) -> tuple[Mix, Callable[[], Cache]]:
    """The `mix` of one decode step, and what it makes of the cache; arguments as in paged.mixer."""
    pages, copies = (list(cache.keys), list(cache.values)), (list(cache.lane_keys), list(cache.lane_values))
    index = kv.live_index(table, position, live, page_size, pages[0][0].shape[1])
    target = jnp.where(live, position, FAR)

    def mix(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for store, new in zip(pages, (k, v)):
            store[number] = kv.scatter(store[number], index, new)
        keys, values = write(copies[0][number], copies[1][number], target, k[:, 0], v[:, 0])
        copies[0][number], copies[1][number] = keys, values
        window = a.window if a.local[number] else None
        return attend(q[:, 0], keys, values, position, live, window, a.attention_scale or None)[:, None]

    return mix, lambda: Cache(tuple(pages[0]), tuple(pages[1]), tuple(copies[0]), tuple(copies[1]))


def attend(
    query: jax.Array, key: Tiles, value: Tiles, position: jax.Array, live: jax.Array,
    window: int | None = None, scale: float | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention of one token a lane, tile after tile (Milakov and Gimelshein 2018, arXiv 1805.02867), in
    float32; tiles that no live lane sees are not read.

    query [B, N, H] of tokens at position [B], which see those up to it, the last `window` of them where there is one;
    key n times [B, K, H, tile]; value n times [B, K, tile, H]; live [B]: of other lanes the result means nothing ->
    [B, N, H]. scale of the scores; None: H^-0.5.

    Both products are sums of products, not matrix products: with a query or two to a key, XLA for CPU runs those at a
    third of the speed of memory in one layout, from some hundred tokens on at a thirtieth in another (docs/LOG.md).
    """
    B, N, H = query.shape
    K, size = value[0].shape[1:3]
    q = (query * (scale or H**-0.5)).reshape(B, K, N // K, H, 1).astype(jnp.float32)
    first = jnp.maximum(position - window + 1, 0) if window else jnp.zeros_like(position)
    begin = jnp.min(jnp.where(live, first, len(key) * size)) // size
    end = jnp.max(jnp.where(live, position, -1)) // size + 1

    def read(start: int, sums: Sums, key: jax.Array, value: jax.Array) -> Sums:
        at = start + jnp.arange(size)
        seen = (at <= position[:, None]) & (at >= first[:, None])
        scores = jnp.sum(q * of_group(key), -2)  # [B, K, G, tile]
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        largest = jnp.maximum(sums.largest, jnp.max(scores, -1, keepdims=True))
        weights, scaled = jnp.exp(scores - largest), jnp.exp(sums.largest - largest)
        mixed = sums.mixed * scaled + jnp.sum(weights[..., None] * of_group(value), -2)
        return Sums(largest, sums.total * scaled + jnp.sum(weights, -1, keepdims=True), mixed)

    group = B, K, N // K
    sums = Sums(jnp.full((*group, 1), MASKED), jnp.zeros((*group, 1)), jnp.zeros((*group, H)))
    for i, tile in enumerate(zip(key, value)):
        # Written out: what a loop reads by number is copied out of the whole first, which takes as long as reading it.
        sums = jax.lax.cond((begin <= i) & (i < end), partial(read, i * size), lambda sums, *_: sums, sums, *tile)
    return (sums.mixed / jnp.maximum(sums.total, 1e-30)).astype(query.dtype).reshape(B, N, H)


def of_group(tile: jax.Array) -> jax.Array:
    """For every query of a group: [B, K, 1, ...] float32."""
    return tile[:, :, None].astype(jnp.float32)


def take_up(cache: Cache, lane: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """The cache with the pages of the stream that table [n] names copied into a lane."""
    number, size = len(cache.lane_values[0]), cache.lane_values[0][0].shape[2]

    def copied(own: Tiles, store: jax.Array, turned: bool) -> Tiles:
        pages = kv.gather(store, table[None], page_size)  # [K, 1, S, H]
        S = pages.shape[2]
        pages = jnp.pad(pages, ((0, 0), (0, 0), (0, number * size - S), (0, 0))).swapaxes(0, 1)
        parts = [part.swapaxes(2, 3) if turned else part for part in jnp.split(pages, number, 2)]
        return tuple(jax.lax.dynamic_update_slice(old, new, (lane, 0, 0, 0)) for old, new in zip(own, parts))

    return cache._replace(
        lane_keys=tuple(copied(own, store, True) for own, store in zip(cache.lane_keys, cache.keys)),
        lane_values=tuple(copied(own, store, False) for own, store in zip(cache.lane_values, cache.values)),
    )


def write(keys: Tiles, values: Tiles, positions: jax.Array, key: jax.Array, value: jax.Array) -> tuple[Tiles, Tiles]:
    """Write key and value [B, K, H] of one token a lane at positions [B]; one past the end is dropped."""
    size, rows = values[0].shape[2], jnp.arange(len(positions))
    places = [jnp.where(positions // size == i, positions % size, size) for i in range(len(values))]
    options = {"mode": "drop", "unique_indices": True}
    keys = tuple(x.at[rows, :, :, at].set(key.astype(x.dtype), **options) for x, at in zip(keys, places))
    return keys, tuple(x.at[rows, :, at].set(value.astype(x.dtype), **options) for x, at in zip(values, places))
