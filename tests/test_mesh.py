import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlrag.mesh import constrain, make_mesh, partition, sharding


def test_takes_all_devices_with_automatic_axes():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(("data", "model"), [(2, 1), (1, 3), (-1, 0), (-1, -1), (0, 1), (-1, 2), (-2, 1)])
def test_wrong_sizes_are_named(data, model):
    with pytest.raises(ValueError, match=rf"data={data} x model={model} does not cover 1 device.*product is 1"):
        make_mesh(data, model, jax.devices()[:1])


def test_unknown_logical_axes_are_replicated():
    assert partition(("rows", None, "heads", "nothing")) == PartitionSpec("data", None, "model", None)


def test_without_a_mesh_constrain_does_nothing():
    x = jnp.ones((4, 3))
    assert constrain(x, "rows", None) is x


def test_every_dimension_must_be_named():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="zip"):
        sharding(mesh, ("rows",), (4, 3))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="zip"):
        jax.jit(lambda x: constrain(x, "rows"))(jnp.ones((4, 3)))


def print_shardings() -> None:
    mesh = make_mesh(4, 2)
    print(tuple(sharding(mesh, ("rows", "embed2", "mlp"), (8, 3, 6)).spec))
    print(tuple(sharding(mesh, ("rows", "mlp"), (6, 5)).spec))  # 4 does not divide 6, nor 2 divide 5: whole

    def inside(x):
        # `data` is manual here and already cut; `model` is not.
        return constrain(x * 2, "rows", "heads")

    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        mapped = jax.jit(jax.shard_map(inside, in_specs=spec, out_specs=spec, axis_names={"data"}))
        result = mapped(np.ones((8, 6), np.float32))
        print(tuple(result.sharding.spec), float(result.sum()))
        print(tuple(jax.jit(lambda x: constrain(x + 1, "rows", "heads"))(np.ones((8, 6), np.float32)).sharding.spec))


def test_shardings_on_eight_devices(run_on_devices):
    assert run_on_devices(print_shardings).splitlines() == [
        "('data', None, 'model')",
        "(None, None)",
        "('data', 'model') 96.0",
        "('data', 'model')",
    ]
