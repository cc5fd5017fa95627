"""The interpreters' switch: when kernels of other platforms may run, that memory is poisoned and races are errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, interpret
from kernels.dispatch import Implementation

ACCELERATED = {"kernel": Implementation(None, platforms=("cuda",)), "plain": Implementation(None)}


def gpu_copy(x, body, num_threads):
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype)],
        num_threads=num_threads,
        thread_name="thread",
        interpret=interpret.gpu(),
    )
    return kernel(x)


def test_a_kernel_of_another_platform_runs_only_inside():
    with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
        dispatch.choose("op", ACCELERATED, "kernel")
    with interpret.interpreted():
        assert interpret.active()
        assert dispatch.choose("op", ACCELERATED, "kernel").default == "kernel"
        assert dispatch.choose("op", ACCELERATED, None).default == "plain"  # never by itself
    assert (interpret.active(), interpret.gpu(), interpret.tpu()) == (False, None, False)


def test_the_switch_is_off_after_an_error():
    with pytest.raises(KeyError), interpret.interpreted():
        raise KeyError
    assert not interpret.active()


@pytest.mark.parametrize("tpu_memory", [False, True])
def test_tpu_outputs_are_poisoned(tpu_memory):
    def body(x_ref, y_ref, z_ref):
        y_ref[...] = x_ref[...]  # z_ref stays as it was

    with interpret.interpreted(tpu_memory=tpu_memory):
        shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        y, z = pl.pallas_call(body, out_shape=(shape, shape), interpret=interpret.tpu())(jnp.ones((8, 128)))
    np.testing.assert_array_equal(y, 1)
    np.testing.assert_array_equal(z, np.nan)


def test_gpu_memory_is_poisoned():
    def body(x_ref, y_ref, scratch_ref):
        y_ref[...] = scratch_ref[...] + x_ref[...]

    with interpret.interpreted():
        np.testing.assert_array_equal(gpu_copy(jnp.ones(128), body, 1), np.nan)


def test_a_race_is_an_error_though_another_kernel_ran_after_it():
    def racing(x_ref, y_ref, scratch_ref):
        scratch_ref[...] = x_ref[...]  # both threads write it

        @pl.when(jax.lax.axis_index("thread") == 0)
        def _():
            y_ref[...] = x_ref[...]

    def sound(x_ref, y_ref, scratch_ref):
        scratch_ref[...] = x_ref[...]
        y_ref[...] = scratch_ref[...]

    def run():
        with interpret.interpreted():
            gpu_copy(jnp.ones(128), racing, 2)
            gpu_copy(jnp.ones(128), sound, 1)

    with pytest.raises(AssertionError, match="raced"):
        run()
    run_sound = functools.partial(gpu_copy, jnp.ones(128), sound, 1)
    with interpret.interpreted():
        np.testing.assert_array_equal(run_sound(), 1)  # what raced before is forgotten
