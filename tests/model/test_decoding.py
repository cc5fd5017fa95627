"""Decode weights and how they are cut: each part is a model of its own, and their sums are the whole."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlrag.mesh import make_mesh
from rlrag.model.architecture import Adapters, Architecture
from rlrag.model.decoding import Parts, abstract_weights, build_pack, pack, parts, specs
from rlrag.model.parameters import initialize, shardings

A = Architecture(
    vocab_size=24, num_layers=2, embed_dim=16, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=12, qkv_bias=True,
    tied=False, base="int8", adapters=Adapters(rank=2, names="one,two"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "model", "wanted"),
    [
        ({}, 1, Parts(1, 1, 1)),
        ({}, 2, Parts(2, 2, 2)),
        ({}, 4, Parts(4, 4, 4)),  # a kv head stands twice
        ({}, 8, Parts(8, 1, 8)),  # 12 columns do not divide
        ({"num_heads": 6}, 4, Parts(1, 4, 4)),  # nor do 6 heads
        ({"num_kv_heads": 8}, 16, Parts(1, 1, 1)),
        ({"vocab_size": 25}, 2, Parts(2, 2, 1)),
    ],
)
def test_what_does_not_divide_stays_whole(change, model, wanted):
    assert parts(replace(A, **change), model) == wanted


def columns(matrix, shard, of):
    width = matrix.shape[-1] // of
    return np.asarray(matrix)[..., shard * width : (shard + 1) * width]


def test_each_part_has_its_own_heads_and_columns_side_by_side():
    a = replace(A, base="", adapters=Adapters())
    params = initialize(a, jax.random.key(0))
    whole, cut = pack(params, a), pack(params, a, parts(a, 4))
    q, k, v = np.split(np.asarray(whole.layers[1].qkv), [32, 40], -1)
    gate, up = np.split(np.asarray(whole.layers[1].gate_up), 2, -1)
    for shard in range(4):
        own = np.concatenate([columns(q, shard, 4), columns(k, shard // 2, 2), columns(v, shard // 2, 2)], -1)
        np.testing.assert_array_equal(columns(cut.layers[1].qkv, shard, 4), own)
        own = np.concatenate([columns(gate, shard, 4), columns(up, shard, 4)], -1)
        np.testing.assert_array_equal(columns(cut.layers[1].gate_up, shard, 4), own)
    own = parts(a, 4).own(a)
    assert (own.num_heads, own.num_kv_heads, parts(a, 4).num_kv_heads(a)) == (2, 1, 4)


def test_every_weight_has_its_place():
    """Cut by outputs, by inputs, or not at all: bytes, scales and adapters too."""
    cut = parts(A, 2)
    layer = specs(jax.eval_shape(lambda: pack(initialize(A, jax.random.key(0)), A, cut)), cut)
    first, by_output, by_input = layer.layers[0], PartitionSpec(None, "model"), PartitionSpec("model")
    assert first.qkv.values == first.qkv.scale == first.gate_up.values == by_output
    assert first.output.values == first.down.values == by_input
    assert first.output.scale == first.attention_norm == layer.final_norm == PartitionSpec()
    assert first.qkv_bias == layer.embed == layer.head == by_input
    assert first.low["query"].up == first.low["up"].up == PartitionSpec(None, None, "model")
    assert first.low["output"].down == first.low["down"].down == by_input
    assert first.low["query"].down == first.low["down"].up == PartitionSpec()


def print_bytes() -> None:
    mesh = make_mesh(2, 2, jax.devices()[:4])
    a = replace(A, base="", adapters=Adapters())
    with jax.set_mesh(mesh):
        params = initialize(a, jax.random.key(0))
        weights = build_pack(a, mesh)(jax.device_put(params, shardings(a, mesh)))
    expected = jax.tree.map(np.asarray, pack(params, a, parts(a, 2)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, weights), expected)
    planned = abstract_weights(a, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, plan: leaf.sharding == plan.sharding, weights, planned))
    print(weights.layers[0].qkv.addressable_shards[0].data.nbytes, weights.layers[0].qkv.nbytes)


def test_a_device_holds_its_part_alone(run_on_devices):
    assert run_on_devices(print_bytes, 4).split() == [str(16 * 24 * 4), str(16 * 48 * 4)]
