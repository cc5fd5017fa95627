"""The policy's parameters: a pytree of arrays, each leaf described once.

Initial values, shardings and shapes all derive from `describe`, so a new leaf is one line. What learns of them is said
by their paths: `learning`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlrag.mesh import Axes, sharding
from rlrag.model.adapters import Adaptation, LowRank, addition, enlarged
from rlrag.model.architecture import TARGETS, Adapters, Architecture
from rlrag.model.quantized import Matrix, Quantized, numbers_of, quantize


class Leaf(NamedTuple):
    """One parameter: shape, logical axes, and the standard deviation of its normal initial values about `mean`. dtype:
    empty for the architecture's `param_dtype`."""

    shape: tuple[int, ...]
    axes: Axes
    stddev: float
    mean: float = 0.0
    dtype: str = ""


@flax.struct.dataclass
class Layers:
    """All layers, stacked on axis 0 (L). Absent options are None and no leaves."""

    attention_norm: jax.Array  # [L, D]
    query: Matrix  # [L, D, N*H]
    key: Matrix  # [L, D, K*H]
    value: Matrix  # [L, D, K*H]
    query_bias: jax.Array | None  # [L, N*H]
    key_bias: jax.Array | None  # [L, K*H]
    value_bias: jax.Array | None  # [L, K*H]
    query_norm: jax.Array | None  # [L, H]
    key_norm: jax.Array | None  # [L, H]
    output: Matrix  # [L, N*H, D]
    post_attention_norm: jax.Array | None  # [L, D]
    mlp_norm: jax.Array  # [L, D]
    gate: Matrix  # [L, D, F]
    up: Matrix  # [L, D, F]
    down: Matrix  # [L, F, D]
    post_mlp_norm: jax.Array | None  # [L, D]


@flax.struct.dataclass
class Transformer:
    embed: jax.Array  # [V, D]
    layers: Layers
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None: tied to embed
    value_head: jax.Array | None  # [D]
    adapters: Adaptation | None = None

    @property
    def table(self) -> jax.Array:  # [V, D]
        """The embedding as adapters have it."""
        return enlarged(self.embed, self.adapters and self.adapters.rows)

    @property
    def output_head(self) -> jax.Array:  # [V, D]
        return self.table if self.head is None else enlarged(self.head, self.adapters and self.adapters.head_rows)


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
    adapters = describe_adapters(a, layers) if a.adapters.rank else None
    if a.base:
        bytes_ = {name: as_bytes(getattr(layers, name)) for name in TARGETS}
        layers = layers.replace(**bytes_)  # type: ignore[attr-defined]
    return Transformer(
        embed=leaf((V, D), ("vocab", "embed"), 0.02),
        layers=layers,
        adapters=adapters,
        final_norm=scale((D,)),
        head=leaf((V, D), ("vocab", "embed"), D**-0.5, not a.tied),
        value_head=leaf((D,), (None,), 0, a.value_head),
    )


def describe_adapters(a: Architecture, layers: Any) -> Adaptation:
    """Beside the described matrices of the layers: as many inputs and outputs, float32 whatever those are."""
    A, r, n = len(a.adapters.listed), a.adapters.rank, a.adapters.rows

    def low(matrix: Leaf) -> Any:
        (L, inputs, outputs), (_, inside, outside) = matrix.shape, matrix.axes
        # The spread of peft's default (uniform within 1 / sqrt(inputs)), so that its learning rates serve here.
        down = Leaf((L, inputs, A, r), (None, inside, None, None), (3 * inputs) ** -0.5, dtype="float32")
        return LowRank(down, Leaf((L, A, r, outputs), (None, None, None, outside), 0.0, dtype="float32"))  # type: ignore[arg-type]

    rows: Any = Leaf((n, a.embed_dim), (None, "embed"), 0.0, dtype="float32") if n else None
    layers_low = {name: low(getattr(layers, name)) for name in a.adapters.chosen}
    return Adaptation(layers_low, rows, None if a.tied else rows)


def as_bytes(matrix: Leaf) -> Any:
    """The leaves of a matrix that is held as bytes."""
    L, _, outputs = matrix.shape
    scale = Leaf((L, 1, outputs), (None, None, matrix.axes[-1]), 0.0, dtype="float32")
    return Quantized(matrix._replace(dtype="int8"), scale)  # type: ignore[arg-type]


def is_leaf(x: object) -> bool:
    return isinstance(x, Leaf)


def map_leaves(function: Callable[[Leaf], object], architecture: Architecture):
    return jax.tree.map(function, describe(architecture), is_leaf=is_leaf)


def shardings(architecture: Architecture, mesh: Mesh):
    """NamedSharding of every parameter."""
    return laid(describe(architecture), mesh)


def abstract(architecture: Architecture, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of every parameter, without any value."""

    def one(leaf: Leaf) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(leaf.dtype or architecture.param_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding(mesh, leaf.axes, leaf.shape))

    return map_leaves(one, architecture)


def initialize(architecture: Architecture, key: jax.Array) -> Transformer:
    """Fresh parameters in `param_dtype`; the value of a leaf depends on the key and its place in the tree alone."""
    first = drawn(describe(plain(architecture)), architecture.param_dtype, key)
    return furnished(first, architecture, jax.random.fold_in(key, 2**31 - 1))


def plain(architecture: Architecture) -> Architecture:
    """The same without adapters, its matrices as numbers: what is published, and what is exported."""
    return replace(architecture, base="", adapters=Adapters())


def furnished(params: Transformer, architecture: Architecture, key: jax.Array) -> Transformer:
    """Plain parameters as an architecture holds them: matrices as bytes, new adapters that add nothing."""
    layers, adapters = params.layers, None
    if architecture.adapters.rank:
        adapters = drawn(describe(architecture).adapters, "float32", key)
    if architecture.base:
        bytes_ = {name: quantize(getattr(layers, name)) for name in TARGETS}
        layers = layers.replace(**bytes_)  # type: ignore[attr-defined]
    return params.replace(layers=layers, adapters=adapters)  # type: ignore[attr-defined]


# Of any described tree: the decoder's, an encoder's.


def laid(description: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a description."""
    return jax.tree.map(lambda leaf: sharding(mesh, leaf.axes, leaf.shape), description, is_leaf=is_leaf)


def drawn(description: Any, param_dtype: str, key: jax.Array) -> Any:
    """Initial values of every leaf of a description."""
    leaves, tree = jax.tree.flatten(description, is_leaf=is_leaf)

    def draw(index: int, leaf: Leaf) -> jax.Array:
        dtype = jnp.dtype(leaf.dtype or param_dtype)
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


def merged(params: Transformer, architecture: Architecture, adapter: str = "") -> Transformer:
    """The parameters of a plain model that says what these say with one of their adapters; empty: with none."""
    low = params.adapters.layers if params.adapters and adapter else {}
    number = architecture.adapters.number(adapter) if adapter else 0

    def whole(name: str) -> jax.Array:
        matrix, dtype = numbers_of(getattr(params.layers, name)), jnp.dtype(architecture.param_dtype)
        if name not in low:
            return matrix.astype(dtype)
        return (matrix.astype(jnp.float32) + addition(low[name], number, architecture.adapters.scale)).astype(dtype)

    layers = params.layers.replace(**{name: whole(name) for name in TARGETS})  # type: ignore[attr-defined]
    embed, head = params.embed, params.head
    if adapter:
        embed, head = params.table, None if head is None else params.output_head
    return params.replace(embed=embed, layers=layers, head=head, adapters=None)  # type: ignore[attr-defined]


# What learns of a tree.


def learning(architecture: Architecture, trains: str = "") -> Any:
    """For every parameter whether it learns. trains: paths separated by commas, each with all that lies under it, as
    "layers.query,embed"; empty: everything, or the adapters (and a value head) where there are any.

    Raises ValueError where a path names nothing, or a matrix that is held as bytes.
    """
    wanted = trains.split(",") if trains else ["adapters", "value_head"] if architecture.adapters.rank else [""]
    found = dict.fromkeys(wanted, False)

    def one(path: Any, leaf: Leaf) -> bool:
        place = jax.tree_util.keystr(path, simple=True, separator=".")
        by = [each for each in wanted if not each or place == each or place.startswith(f"{each}.")]
        found.update(dict.fromkeys(by, True))
        if by and trains and leaf.dtype == "int8":
            raise ValueError(f"update.trains is {trains!r}, but {place} is held as bytes (model.base), which stay")
        return bool(by)

    learns = jax.tree_util.tree_map_with_path(one, describe(architecture), is_leaf=is_leaf)
    for each in wanted if trains else ():
        if not found[each]:
            raise ValueError(
                f"update.trains names {each!r}, which is no parameter: give paths such as embed, layers, layers.query"
                + (", adapters" if architecture.adapters.rank else "")
            )
    return learns


def part(tree: Any, learns: Any) -> Any:
    """Of a tree the leaves that learn; None elsewhere."""
    return jax.tree.map(lambda keep, leaf: leaf if keep else None, learns, tree)


def joined(own: Any, whole: Any) -> Any:
    """The whole with its own leaves in place of those that learn."""
    return jax.tree.map(lambda new, old: old if new is None else new, own, whole, is_leaf=lambda x: x is None)


def num_parameters(architecture: Architecture) -> int:
    leaves = jax.tree.leaves(describe(architecture), is_leaf=is_leaf)
    return sum(math.prod(leaf.shape) for leaf in leaves)
