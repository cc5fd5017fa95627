"""Tile sizes that were measured to be best: ``tiles.json``, by operation, kind of device and bucket of shapes.

    {"NVIDIA H200": {"log_prob fwd": {"hidden=2048 tokens=16384 vocabulary=262144": {
        "tiles": {"block_n": 128}, "time_s": 0.011, "jax": "0.11.2", "date": "2026-09-01"}}}}

A bucket is the shape with every size rounded up to a power of two: a tile that suits V = 151,936 suits V = 152,064.
``python -m kernels.bench --tune`` writes the file; nothing is tuned while a program runs.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax

PATH = Path(__file__).with_name("tiles.json")


def lookup(operation: str, device_kind: str, **shape: int) -> dict[str, int]:
    """The recorded tile sizes, by the names of an implementation's keywords; {} where nothing is recorded.

    Args:
      operation: as in ``tiles.json``; an implementation says in its docstring which it looks up.
      device_kind: of ``jax.Device``, see ``device_kind()``.
      shape: sizes by name, all those that the entry was recorded with.
    """
    return dict(read().get(device_kind, {}).get(operation, {}).get(bucket(**shape), {}).get("tiles", {}))


def bucket(**shape: int) -> str:
    """The name of the bucket: sizes rounded up to powers of two, in the order of their names."""
    return " ".join(f"{name}={1 << max(0, size - 1).bit_length()}" for name, size in sorted(shape.items()))


def device_kind() -> str:
    """The kind of this process's devices, the first key of the table."""
    return jax.devices()[0].device_kind


@functools.cache
def read() -> dict[str, Any]:
    """The whole table; whoever writes the file calls ``read.cache_clear()``."""
    return json.loads(PATH.read_text())
