"""Exact dense search, max over x of <q, x>, as one JAX program over all devices of a mesh.

The corpus lies on the devices by rows, over every axis of the mesh. A device goes over its rows block by block and
keeps the k best so far; then the devices' winners, and nothing else, travel and are merged. Everything is exact but the
rounding of the stored type: no candidate is ever dropped by an approximate selection.

Within a block the scores [B, Q] are looked at in groups of neighbouring rows: the k groups with the largest maxima hold
the k best rows. Proof: a row outside of them has k groups whose maximum is larger, or equal and in a lower group. So
only the groups' maxima and k groups are searched, which costs less than a search of the block (docs/LOG.md).

Letters: N rows, D dims, Q queries, B rows of a block, G rows of a group, S devices.
"""

import operator
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlrag.mesh import make_mesh
from rlrag.retrieval.vectors import ON_DEVICE

BATCHES = (1, 8, 32, 128, 512)  # queries of a program; others are padded to these or cut into them
# A batch is padded by at most so many queries, and cut otherwise: reading the corpus once more costs about as much.
SPARE_CPU, SPARE_ACCELERATOR = 32, 384
BLOCK_CPU, BLOCK_ACCELERATOR = 4096, 65536
_ALIGNED = 128  # rows; a block is a multiple of it, hence of every group
_FEWEST = 4  # k is rounded up to a power of two from here, so that few programs are compiled
_SLICE_BYTES = 32 * 2**20  # float32 bytes of the corpus held on the host at a time
_TINY = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


class DenseSearch:
    """Exact maximum inner product search over a matrix [N, D]. Safe to call from many threads.

    matrix: a NumPy array, a memory map, or what has ndim, shape, dtype and slices of rows. It is read once and not
      kept.
    mesh: see rlrag.mesh.make_mesh; None: all devices of this process. Each process reads the rows of its own devices
      only, and all processes must make the same searches. Searches take turns; a thread that runs another program with
      collectives on the same devices must not do so while a search runs, because devices could then start the two in
      different orders and wait for ever.
    dtype: how rows are stored. For a query q and a row x, the score differs from the float64 inner product, beside
      float32 rounding, by at most
        float32    0
        float16    2^-11 sum |q_d x_d|, plus 2^-25 sum |q_d| where numbers of x are below 2^-14
        bfloat16   2^-9 sum |q_d x_d|
        int8       max |x_d| / 254 * sum |q_d|        (symmetric, one float32 scale a row: max |x_d| / 127)
      On accelerators the products of the last three are of the stored type (int8: bfloat16, which holds every int8)
      and the query is rounded to it too, which adds at most 2^-9 sum |q_d x'_d| (float16: 2^-11) of the stored row x'.
    block: most rows at a time on a device (None: 4,096 on CPU, 65,536 elsewhere, the latter not measured). Blocks are
      made even and then rounded up to a multiple of 128; the attribute of that name says what they became.
    compute: the type of the products (None: as above); sums are float32 always.
    """

    def __init__(
        self,
        matrix: Any,
        mesh: Mesh | None = None,
        *,
        dtype: str = "float32",
        block: int | None = None,
        compute: str | None = None,
    ):
        if getattr(matrix, "ndim", 0) != 2 or 0 in matrix.shape:
            raise ValueError(
                f"the corpus has shape {np.shape(matrix)}: give a matrix [rows, dims] with at least one row"
            )
        if matrix.dtype.kind not in "iuf" and matrix.dtype != jnp.bfloat16:
            raise ValueError(f"the corpus is of type {matrix.dtype}: give real numbers, such as float32")
        if dtype not in ON_DEVICE:
            raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(ON_DEVICE)}")
        mesh = mesh or make_mesh(devices=jax.local_devices())
        if any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise ValueError(f"the mesh has axes of types {mesh.axis_types}: use rlrag.mesh.make_mesh, whose are Auto")
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        block = (BLOCK_CPU if on_cpu else BLOCK_ACCELERATOR) if block is None else block
        if block < 1:
            raise ValueError(f"block is {block}: give at least 1 row")
        self.num_rows, self.dims = matrix.shape
        needed = -(-self.num_rows // mesh.size)  # of the fullest device
        blocks = -(-needed // block)
        self.block = -(-needed // (blocks * _ALIGNED)) * _ALIGNED  # even blocks, so that little is padding
        rows = blocks * self.block * mesh.size
        if rows >= 2**31:
            raise ValueError(f"{rows} rows with padding do not fit int32 row numbers: cut the corpus in two")
        self._spare = SPARE_CPU if on_cpu else SPARE_ACCELERATOR
        self._lock = threading.Lock()
        self._largest = 0.0  # the largest stored number, by its absolute value
        self._matrix, self._scales = self._load(matrix, mesh, rows, dtype)
        stored_on_cpu = "float32" if on_cpu else {"int8": "bfloat16"}.get(dtype, dtype)
        self._program = _build(mesh, self.num_rows, self.block, jnp.dtype(compute or stored_on_cpu))

    @property
    def nbytes(self) -> int:
        """Bytes on a device, the same on all: rows, padding and scales."""
        arrays = [self._matrix] if self._scales is None else [self._matrix, self._scales]
        return sum(array.addressable_shards[0].data.nbytes for array in arrays)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k rows of the largest inner product with each query [Q, D], best first; all rows where k > N.

        Returns scores [Q, k] float32 and rows [Q, k] int32. Equal scores come by row, as a stable sort leaves them.
        Scores of one query may differ in their last bits between batch sizes and blocks, whose sums are ordered
        differently. Raises ValueError for wrong shapes, numbers that are not finite, and k below 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dims:
            raise ValueError(f"queries have shape {queries.shape}: give [queries, {self.dims}], as the corpus has dims")
        k = min(_at_least_one(k), self.num_rows)
        with np.errstate(over="ignore"):
            queries = queries.astype(np.float32, copy=False)
        _check_finite(queries, "query")
        reach = np.abs(queries, dtype=np.float64).sum(axis=1) * self._largest
        if reach.size and reach.max() > _LARGEST:
            raise ValueError(f"query {reach.argmax()} is so large that its scores may not fit float32: scale it down")
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
        with self._lock:
            found = [
                (part, self._program(self._matrix, self._scales, padded, _next_power_of_two(max(k, _FEWEST))))
                for part, padded in _cut(queries, self._spare)
            ]
            for part, (part_scores, part_rows) in found:
                count = part.stop - part.start
                scores[part], rows[part] = np.asarray(part_scores)[:count, :k], np.asarray(part_rows)[:count, :k]
        return scores, rows

    def _load(self, matrix: Any, mesh: Mesh, rows: int, dtype: str) -> tuple[jax.Array, jax.Array | None]:
        """The stored rows [rows, D], zeros after the corpus, and the scales [rows] of int8.

        Every device's rows are written into place slice by slice. jax.make_array_from_callback would be shorter, but it
        holds the converted rows of all devices of this process on the host before it hands over the first.
        """
        lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        size = max(1, _SLICE_BYTES // (4 * self.dims))
        parts, part_scales = [], []
        for device, index in lies.addressable_devices_indices_map((rows, self.dims)).items():
            start, stop, _ = (index or (slice(None),))[0].indices(rows)
            part = jnp.zeros((stop - start, self.dims), dtype, device=device)
            scales = np.full(stop - start, _TINY, np.float32)
            step = min(size, stop - start)
            for at in range(start, min(stop, self.num_rows), step):
                at = min(at, stop - step)  # the last slice looks back, so that all are of one shape
                values, scales[at - start : at - start + step] = self._stored(matrix, at, at + step, dtype)
                part = _write(part, jax.device_put(values, device), at - start)
                part.block_until_ready()  # else slices queue up on the host
            parts.append(part)
            part_scales.append(jax.device_put(scales, device))
        joined = jax.make_array_from_single_device_arrays((rows, self.dims), lies, parts)
        if dtype != "int8":
            return joined, None
        return joined, jax.make_array_from_single_device_arrays((rows,), lies, part_scales)

    def _stored(self, matrix: Any, start: int, stop: int, dtype: str) -> tuple[np.ndarray, np.ndarray | float]:
        """Rows start to stop as they are stored, zeros past the end, and their scales."""
        values = np.zeros((stop - start, self.dims), np.float32)
        with np.errstate(over="ignore"):  # what overflows is told below
            values[: max(self.num_rows - start, 0)] = matrix[start:stop]
        _check_finite(values, "corpus row", start)
        self._largest = max(self._largest, float(np.abs(values).max()))
        if dtype == "int8":
            # Not below the smallest normal number, because devices may take smaller ones for 0.
            scales = np.maximum(np.abs(values).max(axis=1) / np.float32(127), np.float32(_TINY))
            values /= scales[:, None]
            return np.rint(values, out=values).astype(np.int8), scales
        with np.errstate(over="ignore"):
            stored = values.astype(jnp.dtype(dtype))
        _check_finite(stored, f"corpus row, as {dtype},", start)
        return stored, 1.0


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, values: jax.Array, start: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_slice(whole, values, (start, 0))


def _build(mesh: Mesh, num_rows: int, block: int, compute: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted program: (matrix, scales, queries [Q, D] float32, k) -> scores [Q, k] float32, rows [Q, k] int32.

    Where there are fewer than k rows the last scores are -inf, and their rows mean nothing.
    """
    axes = mesh.axis_names

    def shard(matrix: jax.Array, scales: jax.Array | None, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        scaled, exponent = _scaled(queries, compute)
        blocks = matrix.reshape(-1, block, matrix.shape[1])
        scales = None if scales is None else scales.reshape(-1, block)
        first = lax.axis_index(axes) * matrix.shape[0]

        def step(best: tuple[jax.Array, jax.Array], part: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
            values, scale, number = part
            scores = _products(values, scale, scaled)  # [B, Q]
            start = first + number * block
            real = start + jnp.arange(block) < num_rows
            # Padding scores less than any row can. -0 becomes 0: top_k would order them, a sort of numbers does not.
            scores = jnp.where(real[:, None], jnp.where(scores == 0, 0.0, scores), -jnp.inf)
            candidates, rows = _candidates(scores, k)
            # The best so far have lower rows and stand first: top_k takes the first of equals.
            candidates = jnp.concatenate([best[0], candidates], axis=1)
            return _best(candidates, jnp.concatenate([best[1], rows + start], axis=1), k), None

        none = (jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32))
        (scores, rows), _ = lax.scan(step, none, (blocks, scales, jnp.arange(len(blocks), dtype=jnp.int32)))
        if mesh.size > 1:
            # Devices stand in the order of their rows, so that again the first of equals is the lower row.
            scores, rows = _best(*(lax.all_gather(x, axes, axis=1, tiled=True) for x in (scores, rows)), k)
        return (scores if exponent is None else jnp.ldexp(scores, exponent)), rows

    cut, whole = PartitionSpec(axes), PartitionSpec()

    def search(matrix: jax.Array, scales: jax.Array | None, queries: jax.Array, k: int):
        mapped = jax.shard_map(
            partial(shard, k=k),
            mesh=mesh,
            in_specs=(cut, cut, whole),
            out_specs=(whole, whole),
            check_vma=False,  # never differentiated
        )
        return mapped(matrix, scales, queries)

    lies, everywhere = NamedSharding(mesh, cut), NamedSharding(mesh, whole)
    return jax.jit(search, static_argnums=3, in_shardings=(lies, lies, everywhere), out_shardings=everywhere)


def _scaled(queries: jax.Array, compute: Any) -> tuple[jax.Array, jax.Array | None]:
    """Queries in the type of the products. float16 ends at 65,504: they are brought near 1 by a power of two, exactly,
    whose exponents [Q, 1] are given too."""
    if compute != jnp.float16:
        return queries.astype(compute), None
    exponent = jnp.frexp(jnp.abs(queries).max(axis=1, keepdims=True))[1].clip(-100, 126)
    return jnp.ldexp(queries, -exponent).astype(compute), exponent


def _products(values: jax.Array, scale: jax.Array | None, queries: jax.Array) -> jax.Array:
    """Inner products of rows [B, D] (scale [B] or None) with queries [Q, D], as [B, Q] float32."""
    scores = lax.dot_general(
        values.astype(queries.dtype),
        queries,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # else float32 is cut to fewer bits on accelerators
        preferred_element_type=jnp.float32,
    )
    return scores if scale is None else scores * scale[:, None]


def _group_rows(block: int, k: int) -> int:
    """Rows of a group: k groups and the B / G maxima are searched, together the least where G = sqrt(B / k)."""
    return min(max(_next_power_of_two(int((block / k) ** 0.5)), 8), _ALIGNED)


def _candidates(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Scores [B, Q] to scores and rows within the block [Q, C], by row, that hold the k best of each query."""
    block, count = scores.shape
    group = _group_rows(block, k)
    if block // group < 2 * k:  # most groups would be taken
        return scores.T, jnp.broadcast_to(jnp.arange(block, dtype=jnp.int32), (count, block))
    groups = scores.reshape(block // group, group, count)
    taken = lax.top_k(groups.max(axis=1).T, k)[1]
    taken = jnp.sort(taken, axis=1)[:, :, None]  # by row again
    inside = jnp.arange(group, dtype=jnp.int32)
    found = groups[taken, inside, jnp.arange(count)[:, None, None]]  # [Q, k, G]
    return found.reshape(count, -1), (taken * group + inside).reshape(count, -1)


def _best(scores: jax.Array, rows: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of scores [Q, C], the first of equals first, with their rows."""
    best, where = lax.top_k(scores, k)
    return best, jnp.take_along_axis(rows, where, axis=1)


def _cut(queries: np.ndarray, spare: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Parts of the queries, each padded with zeros to one of BATCHES; spare: see SPARE_CPU."""
    start = 0
    while start < len(queries):
        left = len(queries) - start
        enough = next((size for size in BATCHES if size >= left), BATCHES[-1])
        full = max((size for size in BATCHES if size <= left), default=enough)
        size = enough if enough - left <= spare else full
        part = slice(start, min(start + size, len(queries)))
        padded = np.zeros((size, queries.shape[1]), np.float32)
        padded[: part.stop - part.start] = queries[part]
        yield part, padded
        start = part.stop


def _check_finite(values: np.ndarray, what: str, start: int = 0) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ValueError(f"{what} {start + finite.argmin()} has a number that is not finite: drop or repair it")


def _at_least_one(k: Any) -> int:
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 row")
    return k


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
