"""The device mesh and the one table from logical axis names to mesh axes.

Arrays name their dimensions logically ("rows", "heads", ...); this file alone knows that rows lie over `data` and heads
over `model`. FSDP is nothing but parameters' "embed" dimension lying over `data`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"

# Logical axis -> mesh axis. A name that is absent here, or None, is replicated.
RULES = {
    "rows": DATA,  # training rows, prefill rows, decode slots
    "pages": DATA,  # each data shard owns its pages
    "embed": DATA,  # parameters and optimizer state: FSDP
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
}

Axes = tuple[str | None, ...]


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A `data` x `model` mesh; data = -1 takes every device that is left.

    Raises ValueError when the counts do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    data_size = count // max(model, 1) if data == -1 else data
    if model < 1 or data_size * model != count:
        raise ValueError(
            f"mesh data={data} x model={model} does not cover {count} device(s): choose sizes whose product is {count}"
        )
    # Auto is named because jax.make_mesh has begun to default to Explicit axes.
    return jax.make_mesh((data_size, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def partition(axes: Axes, shape: Sequence[int] | None = None, mesh: Mesh | None = None) -> PartitionSpec:
    """The PartitionSpec of logical axes; a dimension that its mesh axis does not divide stays whole."""
    names = [RULES.get(axis) if axis is not None else None for axis in axes]
    if shape is not None and mesh is not None:
        names = [
            name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape, strict=True)
        ]
    return PartitionSpec(*names)


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int] | None = None) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """State how a value inside a jitted function lies on the mesh; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = [RULES.get(axis) if axis is not None else None for axis in axes]
    # Inside a shard_map over `data` that axis is manual, already cut, and must not be named again.
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    names = [
        name if name in free and size % mesh.shape[name] == 0 else None
        for name, size in zip(names, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names))
