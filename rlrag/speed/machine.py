"""What a figure was taken on, what this process compiled, and how much memory it took at most."""

import datetime
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

COMPILING = "/jax/core/compile/backend_compile_duration"  # JAX tells how long it took, the compiler alone


def described(command: str) -> dict[str, Any]:
    """No figure without these."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "device": f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores",
        "memory_bytes": memory_limit(),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "command": command,
    }


def memory_limit() -> int:
    """Bytes that arrays may take of the first device; of the machine where it has no memory of its own."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def peak_bytes() -> int:
    """Most that the first device held since the process began; of the process itself where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Compiled:
    """Programs and seconds of the compiler. What is small counts too: filling an array is a program."""

    programs: int = 0
    seconds: float = 0.0


@contextmanager
def compilations() -> Iterator[Compiled]:
    """What is compiled inside, by any thread."""
    found = Compiled()

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILING:
            found.seconds += duration_secs
            found.programs += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@contextmanager
def profiled(folder: str) -> Iterator[None]:
    """A trace of what runs inside, in a folder: *.xplane.pb for xprof, perfetto_trace.json.gz for ui.perfetto.dev;
    empty: none."""
    if not folder:
        yield
        return
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield
