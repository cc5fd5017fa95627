"""The device mesh and the one table from logical axis names to mesh axes.

Arrays name their dimensions logically ("rows", "heads", ...); this file alone knows that rows lie over `data` and heads
over `model`. FSDP is nothing but parameters' "embed" dimension lying over `data`. Where there are several slices, each
of them a `replica`, parameters are cut within a slice and whole across slices: only gradients travel between them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPLICA, DATA, MODEL = "replica", "data", "model"

# Logical axis -> mesh axes, of which those that a mesh has count. A name that is absent here, or None, is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": (REPLICA, DATA),  # training rows, prefill rows, decode slots
    "pages": (REPLICA, DATA),  # each data shard owns its pages
    "embed": (DATA,),  # parameters and optimizer state: FSDP
    "vocab": (MODEL,),
    "heads": (MODEL,),
    "kv_heads": (MODEL,),
    "mlp": (MODEL,),
}

Axes = tuple[str | None, ...]


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[Any] | None = None, *, replica: int = 1) -> Mesh:
    """A `data` x `model` mesh, `replica` x `data` x `model` where there are several replicas; data = -1 takes every
    device that is left.

    Raises ValueError when the counts do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    data_size = count // max(model * replica, 1) if data == -1 else data
    if min(model, replica) < 1 or data_size * model * replica != count:
        asked = f"data={data} x model={model}" + (f" x replica={replica}" if replica != 1 else "")
        raise ValueError(f"mesh {asked} does not cover {count} device(s): choose sizes whose product is {count}")
    sizes, names = ((replica,) if replica > 1 else ()) + (data_size, model), (REPLICA, DATA, MODEL)[replica == 1 :]
    # Auto is named because jax.make_mesh has begun to default to Explicit axes.
    auto = (AxisType.Auto,) * len(names)
    processes = len({device.process_index for device in devices})
    own, left = divmod(count // processes, model)
    if processes == 1 or left or processes % replica:
        return jax.make_mesh(sizes, names, axis_types=auto, devices=devices)
    # Each process a block: `model` rows within it, where links are fast, and replicas (slices) of whole processes.
    inside, across = (1, own, model), (replica, processes // replica, 1)
    placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, process_is_granule=True)
    return Mesh(placed.reshape(sizes), names, axis_types=auto)


def num_shards(mesh: Mesh) -> int:
    """How many parts rows are cut in."""
    return mesh.size // mesh.shape[MODEL]


def local_mesh(mesh: Mesh) -> Mesh:
    """The `data` x `model` mesh of this process's devices among those of a mesh: where it plays its own episodes.

    Raises ValueError where a `model` row of the mesh lies over several processes.
    """
    rows = mesh.devices.reshape(-1, mesh.shape[MODEL])
    mine = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(rows)
    if (mine.any(1) != mine.all(1)).any():
        raise ValueError(
            f"mesh.model is {mesh.shape[MODEL]}, and a process has {mine.sum()} of the devices: episodes are played by "
            f"each process on its own devices, so make mesh.model a divisor of {mine.sum()}"
        )
    return Mesh(rows[mine.all(1)], (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def to_local(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are whole over rows, as arrays on the local mesh; nothing is copied."""

    def one(array: jax.Array) -> jax.Array:
        assert isinstance(array.sharding, NamedSharding)
        where = NamedSharding(mesh, array.sharding.spec)
        if array.sharding.mesh == mesh:
            return array
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, where, parts)

    return jax.tree.map(one, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """A batch [M, R, ...] of numpy onto the mesh: in several processes each gives the rows of its own devices."""
    where = rows_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    shares = jax.process_count()

    def one(leaf: np.ndarray) -> jax.Array:
        shape = (leaf.shape[0], leaf.shape[1] * shares, *leaf.shape[2:])
        return jax.make_array_from_process_local_data(where, leaf, shape)

    return jax.tree.map(one, tree)


def own_rows(array: jax.Array) -> np.ndarray:
    """Of an array [M, R, ...] on the mesh the rows that this process gave."""
    if array.is_fully_addressable:
        return np.asarray(array)
    found = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(found[start]) for start in sorted(found)], 1)


def partition(axes: Axes, shape: Sequence[int] | None = None, mesh: Mesh | None = None) -> PartitionSpec:
    """The PartitionSpec of logical axes; a dimension that its mesh axes do not divide stays whole."""
    known = set(mesh.axis_names) if mesh is not None else {DATA, MODEL}
    return _spec(axes, known, None if mesh is None or shape is None else (shape, dict(mesh.shape)))


def _spec(axes: Axes, known: set[Any], sizes: tuple[Sequence[int], Mapping[Any, int]] | None) -> PartitionSpec:
    """known: mesh axes that may be named; sizes: of the dimensions and of the mesh axes."""
    found = [tuple(name for name in RULES.get(axis or "", ()) if name in known) for axis in axes]
    if sizes is not None:
        shape, counts = sizes
        found = [
            names if size % math.prod(counts[name] for name in names) == 0 else ()
            for names, size in zip(found, shape, strict=True)
        ]
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in found))


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int] | None = None) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [M, R, ...]."""
    return sharding(mesh, (None, "rows"))


def axes_of(axis: str) -> tuple[str, ...]:
    """The axes of the current mesh that a logical axis lies over; () without one, or inside a shard_map over them."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    return tuple(name for name in RULES[axis] if name in free and mesh.shape[name] > 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """State how a value inside a jitted function lies on the mesh; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # Inside a shard_map over `data` that axis is manual, already cut, and must not be named again.
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    return jax.lax.with_sharding_constraint(x, _spec(axes, free, (x.shape, dict(mesh.shape))))
