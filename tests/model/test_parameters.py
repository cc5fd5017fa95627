import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import describe, initialize, is_leaf, num_parameters, shardings

SMALL = Architecture(vocab_size=96, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=80)
FULL = dataclasses.replace(SMALL, tied=False, qk_norm=True, qkv_bias=True)


@pytest.mark.parametrize("a", [SMALL, FULL], ids=["plain", "full"])
def test_every_leaf_is_as_described(a):
    params, leaves = initialize(a, jax.random.key(0)), jax.tree.leaves(describe(a), is_leaf=is_leaf)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [leaf.shape for leaf in leaves]
    assert num_parameters(a) == sum(leaf.size for leaf in jax.tree.leaves(params))
    for value, leaf in zip(jax.tree.leaves(params), leaves):
        assert value.dtype == jnp.float32
        assert len(leaf.axes) == len(leaf.shape)
        if leaf.stddev == 0:
            assert (value == 1).all()
        else:
            assert float(value.std()) == pytest.approx(leaf.stddev, rel=0.25)
            assert abs(float(value.mean())) < 0.25 * leaf.stddev


def test_options_are_leaves_or_nothing():
    plain, full = initialize(SMALL, jax.random.key(0)), initialize(FULL, jax.random.key(0))
    assert plain.head is None
    assert plain.output_head is plain.embed
    assert full.output_head is full.head
    for name in ("query_bias", "key_bias", "value_bias", "query_norm", "key_norm"):
        assert getattr(plain.layers, name) is None
        assert getattr(full.layers, name) is not None


def test_counts_of_large_models_do_not_overflow():
    """Llama 3.1 70B: 70,553,706,496 parameters."""
    sizes = {"vocab_size": 128256, "num_layers": 80, "embed_dim": 8192, "mlp_dim": 28672}
    a = Architecture(**sizes, num_heads=64, num_kv_heads=8, head_dim=128, tied=False)
    assert num_parameters(a) == 70_553_706_496


def test_leaves_differ_and_follow_the_key():
    first, again, other = (initialize(SMALL, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.layers.gate != first.layers.up).all()
    assert (first.layers.gate[0] != first.layers.gate[1]).all()
    assert (first.layers.gate != other.layers.gate).all()


def test_param_dtype():
    params = initialize(dataclasses.replace(SMALL, param_dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_shapes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="head_dim is 7"):
        initialize(dataclasses.replace(SMALL, head_dim=7), jax.random.key(0))


def print_shardings() -> None:
    mesh = make_mesh(4, 2)
    where = shardings(FULL, mesh)
    params = jax.jit(lambda key: initialize(FULL, key), out_shardings=where)(jax.random.key(0))
    for name in ("query", "output", "gate", "down", "query_bias", "mlp_norm"):
        leaf = getattr(params.layers, name)
        print(name, tuple(leaf.sharding.spec), leaf.addressable_shards[0].data.shape)
    print("embed", tuple(params.embed.sharding.spec), params.embed.addressable_shards[0].data.shape)
    print("sum", float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))))


def test_parameters_lie_over_both_axes_and_do_not_depend_on_it(run_on_devices):
    printed = run_on_devices(print_shardings).splitlines()
    assert printed[:-1] == [
        "query (None, 'data', 'model') (2, 16, 32)",
        "output (None, 'model', 'data') (2, 32, 16)",
        "gate (None, 'data', 'model') (2, 16, 40)",
        "down (None, 'model', 'data') (2, 40, 16)",
        "query_bias (None, 'model') (2, 32)",
        "mlp_norm (None, None) (2, 64)",
        "embed ('model', 'data') (48, 16)",
    ]
    here = float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(initialize(FULL, jax.random.key(0)))))
    assert float(printed[-1].split()[1]) == pytest.approx(here, rel=1e-6)
