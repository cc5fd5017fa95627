"""The policy's parameters: a pytree of arrays, each leaf described once.

Initial values, shardings and shapes all derive from `describe`, so a new leaf is one line.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlrag.mesh import Axes, sharding
from rlrag.model.architecture import Architecture


class Leaf(NamedTuple):
    """One parameter: shape, logical axes, and the standard deviation of its normal initial values about `mean`."""

    shape: tuple[int, ...]
    axes: Axes
    stddev: float
    mean: float = 0.0


@flax.struct.dataclass
class Layers:
    """All layers, stacked on axis 0 (L). Absent options are None and no leaves."""

    attention_norm: jax.Array  # [L, D]
    query: jax.Array  # [L, D, N*H]
    key: jax.Array  # [L, D, K*H]
    value: jax.Array  # [L, D, K*H]
    query_bias: jax.Array | None  # [L, N*H]
    key_bias: jax.Array | None  # [L, K*H]
    value_bias: jax.Array | None  # [L, K*H]
    query_norm: jax.Array | None  # [L, H]
    key_norm: jax.Array | None  # [L, H]
    output: jax.Array  # [L, N*H, D]
    post_attention_norm: jax.Array | None  # [L, D]
    mlp_norm: jax.Array  # [L, D]
    gate: jax.Array  # [L, D, F]
    up: jax.Array  # [L, D, F]
    down: jax.Array  # [L, F, D]
    post_mlp_norm: jax.Array | None  # [L, D]


@flax.struct.dataclass
class Transformer:
    embed: jax.Array  # [V, D]
    layers: Layers
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None: tied to embed
    value_head: jax.Array | None  # [D]

    @property
    def output_head(self) -> jax.Array:  # [V, D]
        return self.embed if self.head is None else self.head


def describe(architecture: Architecture) -> Transformer:
    """The Leaf of every parameter, in the parameters' own tree."""
    a = architecture
    a.check()
    L, D, F, V = a.num_layers, a.embed_dim, a.mlp_dim, a.vocab_size
    query_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim

    def leaf(shape: tuple[int, ...], axes: Axes, stddev: float, there: bool = True) -> Any:
        return Leaf(shape, axes, stddev) if there else None

    def scale(shape: tuple[int, ...], there: bool = True) -> Any:
        return Leaf(shape, (None,) * len(shape), 0.0, mean=1.0 - a.norm_offset) if there else None

    layers = Layers(
        attention_norm=scale((L, D)),
        query=leaf((L, D, query_dim), (None, "embed", "heads"), D**-0.5),
        key=leaf((L, D, kv_dim), (None, "embed", "kv_heads"), D**-0.5),
        value=leaf((L, D, kv_dim), (None, "embed", "kv_heads"), D**-0.5),
        query_bias=leaf((L, query_dim), (None, "heads"), 0.02, a.qkv_bias),
        key_bias=leaf((L, kv_dim), (None, "kv_heads"), 0.02, a.qkv_bias),
        value_bias=leaf((L, kv_dim), (None, "kv_heads"), 0.02, a.qkv_bias),
        query_norm=scale((L, a.head_dim), a.qk_norm),
        key_norm=scale((L, a.head_dim), a.qk_norm),
        output=leaf((L, query_dim, D), (None, "heads", "embed"), query_dim**-0.5),
        post_attention_norm=scale((L, D), a.post_norms),
        mlp_norm=scale((L, D)),
        gate=leaf((L, D, F), (None, "embed", "mlp"), D**-0.5),
        up=leaf((L, D, F), (None, "embed", "mlp"), D**-0.5),
        down=leaf((L, F, D), (None, "mlp", "embed"), F**-0.5),
        post_mlp_norm=scale((L, D), a.post_norms),
    )
    return Transformer(
        embed=leaf((V, D), ("vocab", "embed"), 0.02),
        layers=layers,
        final_norm=scale((D,)),
        head=leaf((V, D), ("vocab", "embed"), D**-0.5, not a.tied),
        value_head=leaf((D,), (None,), 0, a.value_head),
    )


def is_leaf(x: object) -> bool:
    return isinstance(x, Leaf)


def map_leaves(function: Callable[[Leaf], object], architecture: Architecture):
    return jax.tree.map(function, describe(architecture), is_leaf=is_leaf)


def shardings(architecture: Architecture, mesh: Mesh):
    """NamedSharding of every parameter."""
    return laid(describe(architecture), mesh)


def abstract(architecture: Architecture, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of every parameter, without any value."""
    dtype = jnp.dtype(architecture.param_dtype)
    return map_leaves(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding(mesh, leaf.axes, leaf.shape)),
        architecture,
    )


def initialize(architecture: Architecture, key: jax.Array) -> Transformer:
    """Fresh parameters in `param_dtype`; the value of a leaf depends on the key and its place in the tree alone."""
    return drawn(describe(architecture), architecture.param_dtype, key)


# Of any described tree: the decoder's, an encoder's.


def laid(description: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a description."""
    return jax.tree.map(lambda leaf: sharding(mesh, leaf.axes, leaf.shape), description, is_leaf=is_leaf)


def drawn(description: Any, param_dtype: str, key: jax.Array) -> Any:
    """Initial values of every leaf of a description."""
    leaves, tree = jax.tree.flatten(description, is_leaf=is_leaf)
    dtype = jnp.dtype(param_dtype)

    def draw(index: int, leaf: Leaf) -> jax.Array:
        if leaf.stddev == 0:
            return jnp.full(leaf.shape, leaf.mean, dtype)
        return (leaf.stddev * jax.random.normal(jax.random.fold_in(key, index), leaf.shape)).astype(dtype)

    return jax.tree.unflatten(tree, [draw(index, leaf) for index, leaf in enumerate(leaves)])


def reshaped(params: Transformer, architecture: Architecture) -> Transformer:
    """The same model for an architecture that differs in the value head alone: without it, or with one of zeros."""
    head = params.value_head if architecture.value_head else None
    if architecture.value_head and head is None:
        head = jnp.zeros((architecture.embed_dim,), jnp.dtype(architecture.param_dtype))
    return params.replace(value_head=head)  # type: ignore[attr-defined]


def grown(params: Transformer, architecture: Architecture) -> Transformer:
    """The same model with a larger vocabulary: new rows are the mean of the others, so that none is likely at first."""

    def more(rows: jax.Array | None) -> jax.Array | None:
        if rows is None:
            return None
        mean = jnp.mean(rows, 0, keepdims=True, dtype=jnp.float32).astype(rows.dtype)
        return jnp.concatenate([rows, jnp.repeat(mean, architecture.vocab_size - rows.shape[0], 0)])

    return params.replace(embed=more(params.embed), head=more(params.head))  # type: ignore[attr-defined]


def num_parameters(architecture: Architecture) -> int:
    leaves = jax.tree.leaves(describe(architecture), is_leaf=is_leaf)
    return sum(math.prod(leaf.shape) for leaf in leaves)
