"""Operations and bytes of each phase, against counting them one by one and against what a compiler counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from rlrag.mesh import make_mesh
from rlrag.model.parameters import abstract, num_parameters
from rlrag.model.transformer import trunk
from rlrag.speed import floor
from rlrag.speed.floor import Rows, Work
from rlrag.speed.workload import Volume
from tests.speed.tiny import ARCHITECTURE, Rates

A = replace(ARCHITECTURE, num_layers=3, qkv_bias=False)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_parameters_without_norms(tied):
    a = replace(A, tied=tied)
    norms = (2 * a.num_layers + 1) * a.embed_dim
    assert floor.num_weights(a) == num_parameters(a) - norms


def test_gradients_are_three_times_the_products_of_the_forward_pass():
    tokens = 16
    params = abstract(A, make_mesh(devices=jax.devices()[:1]))
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    parent = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    one = replace(A, num_layers=1)  # the compiler counts the body of the scan once
    counted = jax.jit(lambda *x: trunk(x[0], one, *x[1:])).lower(
        abstract(one, make_mesh(devices=jax.devices()[:1])), row, row, row, parent
    )
    flops = counted.compile().cost_analysis()["flops"]
    rows = Rows(tokens, tokens * tokens, 1)  # dense attention computes all pairs
    mine = floor.learning(one, rows, whole=True).flops / 3 - 2 * tokens * floor.head_weights(one)
    assert mine < flops < 1.35 * mine  # the rest is element by element: norms, rotations, softmax, the mask
    assert params.embed.shape == (A.vocab_size, A.embed_dim)


def test_a_decoding_step_reads_weights_once_and_each_slot_s_cache():
    weights = A.num_layers * floor.layer_weights(A) + floor.head_weights(A)
    work = floor.decoding(A, Volume(8, 80, 0, 0), num_slots=4)
    cache = 2 * A.num_layers * A.num_kv_heads * A.head_dim * 4
    assert work.moved_bytes == 2 * weights * 4 + 88 * cache
    assert work.flops == 2 * 8 * weights + 80 * 4 * A.num_layers * A.num_heads * A.head_dim


def test_prefill_leaves_most_of_the_last_layer_out():
    work = floor.prefilling(A, tokens=10, context=0, together=5)
    weights = 2 * floor.layer_weights(A) + 2 * A.embed_dim * A.num_kv_heads * A.head_dim
    assert work == Work(2 * 10 * weights, 2 * weights * 4 + 10 * floor.cache_bytes(A))


def test_adapters_save_a_third_of_the_products_and_the_gradients_bytes():
    rows = Rows(100, 0, 2)
    whole, adapters = floor.learning(A, rows, True), floor.learning(A, rows, False)
    assert adapters.flops == pytest.approx(2 / 3 * whole.flops)
    assert adapters.moved_bytes < whole.moved_bytes
    assert floor.stepping(A, False) == (0, 0)


def test_masters_are_kept_for_bfloat16():
    wide, narrow = A, replace(A, param_dtype="bfloat16")
    own = floor.num_weights(A)
    assert floor.state_bytes(wide, True) == own * (4 + 4 + 4 + 8)
    assert floor.state_bytes(narrow, True) == own * (2 + 2 + 4 + 8 + 4)
    assert floor.state_bytes(narrow, False) == own * 8
    assert floor.stepping(narrow, True).moved_bytes == own * (8 + 16 + 8 + 4)


def test_the_slower_of_products_and_memory_is_the_floor():
    assert Work(3e9, 1e8).seconds(Rates) == 3 and Work(3e9, 1e8).bound(Rates) == "matrix"
    assert Work(1e9, 4e8).seconds(Rates) == 4 and Work(1e9, 4e8).bound(Rates) == "bandwidth"
    assert Work(1, 2) + Work(3, 4) == (4, 6)
