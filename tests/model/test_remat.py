"""What is kept for the backward pass, read from what the compiled step needs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.model.architecture import Architecture
from rlrag.model.parameters import initialize
from rlrag.model.transformer import trunk

A = Architecture(vocab_size=32, num_layers=8, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=256)
B, T = 4, 64


def temporary_bytes(remat: str) -> int:
    a = replace(A, remat=remat)
    positions = np.broadcast_to(np.arange(T), (B, T))

    def loss(params):
        hidden = trunk(
            params, a, np.ones((B, T), np.int32), positions, np.ones((B, T), np.int32), np.zeros((B, 2), int)
        )
        return jnp.sum(hidden**2)

    params = initialize(a, jax.random.key(0))
    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


def test_the_more_is_computed_again_the_less_is_kept():
    everything, elementwise, all_ = (temporary_bytes(remat) for remat in ("", "elementwise", "all"))
    layer_input, attention = 4 * B * T * A.embed_dim, 4 * B * A.num_heads * T * T
    assert everything - elementwise > A.num_layers * attention, "the weights of attention at least"
    assert elementwise - all_ > A.num_layers * 2 * 4 * B * T * A.mlp_dim, "the products of the MLP at least"
    assert all_ > A.num_layers * layer_input


def test_a_wrong_name_is_told():
    with pytest.raises(ValueError, match="remat is 'some': choose nothing or all or elementwise"):
        replace(A, remat="some").check()
