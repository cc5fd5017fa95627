"""The layout of weights for decoding, and how it is cut over the mesh's `model` axis.

Training stacks layers and names dimensions, and the compiler finds the sums. Decoding runs inside a shard_map, where
each device has its own heads, its own columns of the MLP and its own part of the vocabulary, and the sums are written
out (Shoeybi et al. 2019, arXiv 1909.08053, section 3): one after attention and one after the MLP of every layer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlrag.mesh import MODEL, local_mesh, to_local
from rlrag.model.adapters import LowRank
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Layers, Transformer, abstract
from rlrag.model.quantized import Matrix, Quantized


@flax.struct.dataclass
class DecodeLayer:
    """One layer for decoding: products that share an input are one matrix, cut once when weights are packed."""

    attention_norm: jax.Array  # [D]
    qkv: Matrix  # [D, (N + 2K) * H]
    qkv_bias: jax.Array | None  # [(N + 2K) * H]
    query_norm: jax.Array | None  # [H]
    key_norm: jax.Array | None  # [H]
    output: Matrix  # [N*H, D]
    post_attention_norm: jax.Array | None  # [D]
    mlp_norm: jax.Array  # [D]
    gate_up: Matrix  # [D, 2F]
    down: Matrix  # [F, D]
    post_mlp_norm: jax.Array | None  # [D]
    low: dict[str, LowRank]  # what adapters add to each matrix, in one layer


@flax.struct.dataclass
class DecodeWeights:
    """Per-layer list: weights sliced or joined inside the decode loop would be sliced or joined at every step."""

    embed: jax.Array  # [V, D]
    layers: tuple[DecodeLayer, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None: tied

    @property
    def output_head(self) -> jax.Array:
        return self.embed if self.head is None else self.head


class Parts(NamedTuple):
    """In how many parts each kind of weight is cut over `model`; 1: whole on every device, with nothing to sum."""

    heads: int = 1
    mlp: int = 1
    vocab: int = 1

    def own(self, a: Architecture) -> Architecture:
        """What one device computes of an architecture."""
        return replace(a, num_heads=a.num_heads // self.heads, num_kv_heads=max(a.num_kv_heads // self.heads, 1))

    def num_kv_heads(self, a: Architecture) -> int:
        """Over all devices: a head that several need stands once for each of them."""
        return max(a.num_kv_heads, self.heads)


WHOLE = Parts()


def parts(a: Architecture, model: int) -> Parts:
    """How an architecture is cut in `model` parts: what does not divide stays whole."""
    kv_heads = a.num_kv_heads % model == 0 or model % a.num_kv_heads == 0
    return Parts(
        heads=model if a.num_heads % model == 0 and kv_heads else 1,
        mlp=model if a.mlp_dim % model == 0 else 1,
        vocab=model if a.vocab_size % model == 0 else 1,
    )


def pack(params: Transformer, a: Architecture, cut: Parts = WHOLE) -> DecodeWeights:
    """Decode layout of the weights, in the activations' dtype. Called once a rollout, so that FSDP's parameters are
    gathered once and not in every round. Where matrices are joined, what belongs to one part lies together."""
    cast = partial(jnp.asarray, dtype=a.dtype)

    def repeated(matrix: Any) -> Any:
        """Key and value heads of which there are fewer than parts."""
        times = cut.num_kv_heads(a) // a.num_kv_heads
        if times == 1:
            return matrix

        def one(leaf: jax.Array) -> jax.Array:
            heads = leaf.reshape(*leaf.shape[:-1], a.num_kv_heads, a.head_dim)
            return jnp.repeat(heads, times, axis=-2).reshape(*leaf.shape[:-1], -1)

        return jax.tree.map(one, matrix)

    def join(number: int, *matrices: Any) -> Any:
        def one(*leaves: jax.Array) -> jax.Array:
            split = [leaf.reshape(*leaf.shape[:-1], number, -1) for leaf in leaves]
            return jnp.concatenate(split, -1).reshape(*leaves[0].shape[:-1], -1)

        both = jax.tree.map(one, *matrices)
        return both if isinstance(both, Quantized) else cast(both)  # bytes stay as small as they are

    def pack_layer(weights: Layers, low: dict[str, LowRank]) -> DecodeLayer:
        biased = weights.query_bias is not None
        low = {
            name: replace(each, up=repeated(each.up)) if name in ("key", "value") else each
            for name, each in low.items()
        }
        return DecodeLayer(
            attention_norm=weights.attention_norm,
            qkv=join(cut.heads, weights.query, repeated(weights.key), repeated(weights.value)),
            qkv_bias=join(cut.heads, weights.query_bias, repeated(weights.key_bias), repeated(weights.value_bias))
            if biased
            else None,
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            output=join(1, weights.output),
            post_attention_norm=weights.post_attention_norm,
            mlp_norm=weights.mlp_norm,
            gate_up=join(cut.mlp, weights.gate, weights.up),
            down=join(1, weights.down),
            post_mlp_norm=weights.post_mlp_norm,
            low=jax.tree.map(cast, low),
        )

    low = {} if params.adapters is None else params.adapters.layers
    layers = tuple(
        pack_layer(*jax.tree.map(lambda leaf: leaf[i], (params.layers, low)))  # noqa: B023
        for i in range(a.num_layers)
    )
    head = None if params.head is None else cast(params.output_head)
    return DecodeWeights(cast(params.table), layers, params.final_norm, head)


# Which kind of part a weight is cut in: by its outputs, by its inputs, or by its rows.
BY_OUTPUT = {"qkv": "heads", "qkv_bias": "heads", "query": "heads", "key": "heads", "value": "heads"}
BY_OUTPUT |= {"gate_up": "mlp", "gate": "mlp", "up": "mlp"}
BY_INPUT = {"output": "heads", "down": "mlp"}
BY_ROW = {"embed": "vocab", "head": "vocab"}


def specs(weights: Any, cut: Parts) -> Any:
    """The PartitionSpec of every decode weight, in their tree."""

    def one(path: Any, leaf: Any) -> PartitionSpec:
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        # layers[i].qkv, layers[i].qkv.scale, layers[i].low["query"].down: the target, and the part of it.
        target = names[0] if names[0] != "layers" else names[3] if names[2] == "low" else names[2]
        part = names[-1] if len(names) > 3 else ""

        def at(kind: str, dim: int) -> PartitionSpec:
            return PartitionSpec(*[None] * dim, MODEL) if getattr(cut, kind) > 1 else PartitionSpec()

        if target in BY_OUTPUT and part != "down":
            return at(BY_OUTPUT[target], leaf.ndim - 1)
        if target in BY_INPUT and part not in ("scale", "up"):
            return at(BY_INPUT[target], 0)
        return at(BY_ROW[target], 0) if target in BY_ROW else PartitionSpec()

    return jax.tree_util.tree_map_with_path(one, weights)


def abstract_weights(a: Architecture, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of decode weights on a mesh."""
    cut = parts(a, mesh.shape[MODEL])
    shapes = jax.eval_shape(lambda params: pack(params, a, cut), abstract(a, mesh))

    def one(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes, specs(shapes, cut))


def build_pack(a: Architecture, mesh: Mesh) -> Callable[[Transformer], DecodeWeights]:
    """The program that lays parameters out for playing, on the devices of this process: the one reshard between
    training and rollout."""
    cut, here = parts(a, mesh.shape[MODEL]), local_mesh(mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(a, mesh))
    program = jax.jit(lambda params: pack(params, a, cut), out_shardings=where)
    return lambda params: to_local(program(params), here)
