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
import functools
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
    if jax.__version_info__ < (0, 11):
        _teach_transposed_operands()
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


@functools.cache
def _teach_transposed_operands() -> None:
    """The GPU interpreter of JAX 0.10 knows every form of wgmma but a @ b^T, which that of 0.11 knows."""
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.state.types import TransposeTransform

    def transposed(transform: Any) -> bool:
        return isinstance(transform, TransposeTransform)

    original = gpu_callbacks.wgmma

    def wgmma(*, b_transforms: tuple, **given: Any) -> Any:
        if not any(map(transposed, b_transforms)):
            return original(b_transforms=b_transforms, **given)
        memory = gpu_callbacks._get_shared_memory()
        thread = memory.get_global_thread_id(int(given["device_id"]), int(given["thread_id"]))

        def buffer(name: str, transforms: tuple) -> tuple[Any, Any]:
            kept = tuple(each for each in transforms if not transposed(each))
            key = gpu_callbacks.HostAllocationKey.from_array(given[f"{name}_allocation_key_as_array"])
            return key, utils.to_range(jax.tree.map(int, gpu_callbacks._remove_noop_transforms(kept)))

        b, a = buffer("b", b_transforms), buffer("a", given["a_transforms"])
        accumulator = buffer("acc", given["acc_transforms"])
        left, right, sums = (memory.get_buffer_content(*each, thread)[0] for each in (a, b, accumulator))
        assert left is not None and right is not None and sums is not None
        memory.store_buffer_content(*accumulator, sums + left.astype(sums.dtype) @ right.astype(sums.dtype).T, thread)
        return given["token"]

    gpu_callbacks.wgmma = wgmma
