"""Decoding on the pages themselves: every step writes its token where it belongs and reads live pages only.

Where attention can follow a page table (accelerators) this is what a burst does: no view is gathered, none stands
beside the store, and what a step reads follows the tokens that there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.decode_attention.api import decode_attention
from rlrag.model.architecture import Architecture
from rlrag.model.transformer import Mix
from rlrag.rollout import cache as kv
from rlrag.rollout.cache import Cache


def enter(cache: Cache, fresh: jax.Array, num_fresh: jax.Array, table: jax.Array, page_size: int) -> Cache:
    """Nothing is copied when a stream enters a slot."""
    del fresh, num_fresh, table, page_size
    return cache


def mixer(
    cache: Cache, table: jax.Array, position: jax.Array, live: jax.Array, page_size: int, a: Architecture
) -> tuple[Mix, Callable[[], Cache]]:
    """The `mix` of one decode step, and what it makes of the cache.

    table int [B, n]; position int [B] of the token that goes in; live bool [B]: other slots write and see nothing.
    """
    keys, values = list(cache.keys), list(cache.values)
    index = kv.live_index(table, position, live, page_size, keys[0].shape[1])
    length = jnp.where(live, position + 1, 0)

    def mix(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys[number] = kv.scatter(keys[number], index, k)
        values[number] = kv.scatter(values[number], index, v)
        window = a.window if a.local[number] else None
        return decode_attention(
            q[:, 0], keys[number], values[number], table, length,
            page_size=page_size, window=window, scale=a.attention_scale or None,
        )[:, None]  # fmt: skip

    return mix, lambda: cache._replace(keys=tuple(keys), values=tuple(values))
