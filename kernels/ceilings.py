"""What this device can do at best, measured beside whatever is held against it: a bare matrix product, and its memory.

A share of a ceiling is only worth something where both were measured in the same minute: clocks, neighbours and drivers
differ from run to run. So a ceiling is sampled in the same loop as the code it is for, and both are medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.dispatch import current_platform


class Probe(NamedTuple):
    """A program of known work."""

    call: Callable[[], Any]  # returns before the device is done
    work: float  # floating point operations, or bytes read and written


class Sizes(NamedTuple):
    """Large enough that neither start-up nor a cache flatters the figure."""

    product: int  # rows and columns of the square factors
    memory_bytes: int  # of the array that is read


# CPU: 17 GFLOP and 256 MiB, some 40 and 10 ms on two cores; accelerators: 1.1 TFLOP and 1 GiB, 20 times their caches.
SIZES = {"cpu": Sizes(2048, 2**28), "cuda": Sizes(8192, 2**30), "tpu": Sizes(8192, 2**30)}
QUICK = Sizes(256, 2**20)


class Ceilings:
    """Samples of a matrix product's rate and of the memory's bandwidth, taken when asked to."""

    def __init__(self, product: Probe, memory: Sequence[Probe]):
        self._probes = (product, *memory)
        self._seconds: list[list[float]] = [[] for _ in self._probes]
        for probe in self._probes:
            jax.block_until_ready(probe.call())  # compiled, and its pages touched

    @property
    def product(self) -> Probe:
        return self._probes[0]

    def with_product(self, product: Probe) -> "Ceilings":
        """The same memory beside another product, without samples."""
        return Ceilings(product, self._probes[1:])

    def sample(self, times: int = 1) -> None:
        """Time every probe once more, `times` over."""
        for _ in range(times):
            for seconds, probe in zip(self._seconds, self._probes, strict=True):
                begin = time.perf_counter()
                jax.block_until_ready(probe.call())
                seconds.append(time.perf_counter() - begin)

    @property
    def flops(self) -> float:
        """Floating point operations a second in the product; median of the samples."""
        return self._rates()[0]

    @property
    def bandwidth(self) -> float:
        """Bytes a second, reading or updating in place, whichever is more; medians of the samples."""
        return max(self._rates()[1:])

    def _rates(self) -> list[float]:
        return [probe.work / statistics.median(s) for probe, s in zip(self._probes, self._seconds, strict=True)]


def open_ceilings(dtype: Any, sizes: Sizes | None = None) -> Ceilings:
    """Of a square product in a dtype. sizes: None for those of this platform."""
    size, num_bytes = sizes or SIZES[current_platform()]
    return Ceilings(matrix_product(size, size, size, dtype), [memory_read(num_bytes), memory_update(num_bytes)])


def matrix_product(rows: int, inner: int, columns: int, dtype: Any) -> Probe:
    """A product of normal numbers: constant ones would draw less power, and clocks would rise."""
    keys = jax.random.split(jax.random.key(0))
    left = jax.random.normal(keys[0], (rows, inner), dtype)
    right = jax.random.normal(keys[1], (inner, columns), dtype)
    product = jax.jit(lambda left, right: left @ right)
    return Probe(lambda: product(left, right), 2.0 * rows * inner * columns)


def memory_read(num_bytes: int) -> Probe:
    """One pass over an array."""
    array = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return Probe(lambda: total(array), num_bytes)


def memory_update(num_bytes: int) -> Probe:
    """One pass over an array that is written back where it was: no fresh pages are touched."""
    held = [jnp.ones(num_bytes // 4, jnp.float32)]
    update = jax.jit(lambda array: array + 1, donate_argnums=0)

    def call() -> jax.Array:
        held[0] = update(held[0])
        return held[0]

    return Probe(call, 2.0 * num_bytes)
