"""The key/value cache: pages are the store, a contiguous view of some streams is what attention reads.

Where attention over pages is slow (CPU) a round works on a view gathered before it and writes the new tokens back
after it. A page table row lists a stream's pages in order; entries past its end are never read, because the causal
mask ends before them, and never written, because writes name positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlrag.mesh import constrain
from rlrag.model.architecture import Architecture


class Cache(NamedTuple):
    """Per layer [K, P * page, H]: heads lead, so that gathered pages are the view attention wants, untransposed."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def empty(architecture: Architecture, num_pages: int, page_size: int, num_kv_heads: int = 0) -> Cache:
    """num_kv_heads: over all devices, where some stand several times; 0: the architecture's."""
    shape = (num_kv_heads or architecture.num_kv_heads, num_pages * page_size, architecture.head_dim)
    layers = range(architecture.num_layers)

    def zeros() -> jax.Array:
        return constrain(jnp.zeros(shape, architecture.dtype), "kv_heads", "pages", None)

    return Cache(tuple(zeros() for _ in layers), tuple(zeros() for _ in layers))


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


def write(view: jax.Array, positions: jax.Array, new: jax.Array) -> jax.Array:
    """Write new [B, C, K, H] into the view [K, B, S, H] at positions [B, C]; a position >= S is dropped."""
    rows = jnp.arange(view.shape[1])[:, None]
    return view.at[:, rows, positions].set(
        new.transpose(2, 0, 1, 3).astype(view.dtype), mode="drop", unique_indices=True
    )


def read(view: jax.Array, positions: jax.Array) -> jax.Array:
    """view [K, B, S, H] at positions [B, C] -> [B, C, K, H]; positions past the end repeat the last."""
    rows = jnp.arange(view.shape[1])[:, None]
    return view[:, rows, jnp.minimum(positions, view.shape[2] - 1)].transpose(1, 2, 0, 3)
