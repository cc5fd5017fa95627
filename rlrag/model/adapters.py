"""Adapters: low-rank additions by which roles differ on one base (LoRA, Hu et al. 2021, arXiv 2106.09685).

All adapters of a model lie side by side in one array of every target, and each token has a coefficient for each of
them: 1 for its role's, 0 for the others. No coefficient, or no adapters in the tree, is the base. A token of one role
therefore trains that role's adapter alone, and streams of several roles share one batch and one decode step.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LowRank:
    """What is added to one matrix of every layer."""

    down: jax.Array  # float32 [L, in, A, r]
    up: jax.Array  # float32 [L, A, r, out]; zero in a new adapter, which then says what the base says


@flax.struct.dataclass
class Adaptation:
    """All adapters of a model."""

    layers: dict[str, LowRank]  # by the name of the matrix
    rows: jax.Array | None  # float32 [n, D] added to the newest rows of the embedding, by all adapters
    head_rows: jax.Array | None  # float32 [n, D] and of a head of its own


class Voices(NamedTuple):
    """Who speaks in the tokens of a layer's input [M, D]."""

    coefficients: jax.Array  # [M, A], alpha / rank included
    dropout: float = 0.0
    key: jax.Array | None = None  # None: nothing is dropped


def add(y: jax.Array, x: jax.Array, target: str, low: Mapping[str, LowRank], voices: Voices | None) -> jax.Array:
    """y + sum over adapters of coefficient * x down up: x [M, in], y [M, out], the leaves of low of one layer."""
    if voices is None or target not in low:
        return y
    down, up = (leaf.astype(x.dtype) for leaf in (low[target].down, low[target].up))
    A, r = up.shape[:2]
    if voices.key is not None and voices.dropout:
        # A matrix has its own mask: its place among the targets that are there.
        key = jax.random.fold_in(voices.key, sorted(low).index(target))
        kept = jax.random.bernoulli(key, 1 - voices.dropout, x.shape)
        x = jnp.where(kept, x / (1 - voices.dropout), 0).astype(x.dtype)
    inner = (x @ down.reshape(-1, A * r)).reshape(-1, A, r) * voices.coefficients[..., None].astype(x.dtype)
    return y + inner.reshape(-1, A * r) @ up.reshape(A * r, -1)


def enlarged(table: jax.Array, rows: jax.Array | None) -> jax.Array:
    """A table [V, D] whose newest rows have learned."""
    if rows is None:
        return table
    newest = table[-rows.shape[0] :].astype(jnp.float32) + rows
    return table.at[-rows.shape[0] :].set(newest.astype(table.dtype))


def addition(low: LowRank, number: int, scale: float) -> jax.Array:
    """What adapter `number` adds to a matrix: [L, in, out] float32."""
    return scale * jnp.einsum("lir,lro->lio", low.down[:, :, number], low.up[:, number])


def silent(adapters: Adaptation) -> Adaptation:
    """Adapters that add nothing: with them the model says what its base says."""

    def zero(leaf: jax.Array | None) -> jax.Array | None:
        return None if leaf is None else jnp.zeros_like(leaf)

    layers = {name: LowRank(low.down, jnp.zeros_like(low.up)) for name, low in adapters.layers.items()}
    return Adaptation(layers, zero(adapters.rows), zero(adapters.head_rows))
