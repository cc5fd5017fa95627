"""The Pallas interpreters: the one switch under which accelerator kernels run on CPU, for tests.

    with interpret.interpreted():
        stats = jax.jit(functools.partial(token_stats, implementation="mosaic_gpu"))(...)

Outside it a kernel that is asked for by name on a platform it was not written for is an error, as ever. Inside it

- ``dispatch`` accepts such a name on CPU,
- a Mosaic GPU kernel, written ``plgpu.kernel(..., interpret=interpret.gpu())``, runs in the GPU interpreter with its
  race detector on, its memory full of NaN before it is written, and an error for a read out of bounds,
- a TPU kernel, written ``pl.pallas_call(..., interpret=interpret.tpu())``, runs as plain XLA operations on memory
  that is NaN before it is written, or, with ``interpreted(tpu_memory=True)``, in the TPU interpreter, many times
  slower, which also models copies and semaphores and detects races.

Whether a program is interpreted is decided when it is traced, so trace it inside (a function jitted outside stays what
it was). Leaving the context waits for running kernels and raises AssertionError if any of them raced.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import jax

RACE = "RACE DETECTED"  # in the interpreters' words

_active: dict[str, Any] = {}  # "gpu", "tpu" -> what their kernels take as `interpret`; empty outside the context


@contextlib.contextmanager
def interpreted(*, tpu_memory: bool = False) -> Iterator[None]:
    """Run accelerator kernels traced inside in the interpreters of their platform, on CPU."""
    assert not _active, "interpreted() does not nest"
    # Imported here: nothing but tests comes here, and 0.10.2 has these under private names only.
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax.experimental.pallas import tpu as pltpu

    reset_gpu_interpret_mode_state()  # a kernel that raised leaves its simulated memory behind
    _active["gpu"] = InterpretGPUParams(detect_races=True)
    _active["tpu"] = pltpu.InterpretParams(detect_races=True) if tpu_memory else True
    printed = io.StringIO()
    try:
        # The interpreters print a race; their record of it is private and replaced by that of the next kernel.
        with contextlib.redirect_stdout(printed):
            yield
            jax.effects_barrier()
    except Exception as error:  # since 0.12 a race is raised where it is found
        if RACE not in str(error):
            raise
        raise AssertionError(f"a kernel raced: {str(error)[-4000:]}") from None
    finally:
        _active.clear()
        sys.stdout.write(printed.getvalue())
    if RACE in printed.getvalue():
        raise AssertionError(f"a kernel raced: {printed.getvalue()[:2000]}")


def active() -> bool:
    """Whether kernels of other platforms may run here."""
    return bool(_active)


def gpu() -> Any:
    """The argument ``interpret`` of ``plgpu.kernel``."""
    return _active.get("gpu")


def tpu() -> Any:
    """The argument ``interpret`` of ``pl.pallas_call``."""
    return _active.get("tpu", False)
