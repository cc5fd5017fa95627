"""Small steps on narrow parameters, and gradients that are no numbers. Schedules: test_update.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlrag.objectives.optimizer import build_optimizer

SETTINGS = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.5, "clip_norm": 1.0}


def stepped(params, steps: int, gradient=1.0, **options):
    """The parameters after so many steps of 1e-4 each, and the state."""
    optimizer = build_optimizer(optax.constant_schedule(1e-4), **SETTINGS, **options)
    state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, gradient), params)  # float32, as they are summed
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_steps_that_bfloat16_rounds_away_add_up_in_the_originals():
    begun = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    wide, _ = stepped({"w": jnp.ones(3)}, 100)
    step = jnp.full(3, 1.5e-4, jnp.bfloat16)
    assert (begun["w"] - step == 1).all(), "a step is less than half of what separates two numbers there"
    kept, state = stepped(begun, 100, master=True)
    assert (kept["w"] < 1).all()
    assert kept["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept["w"], wide["w"].astype(jnp.bfloat16))
    (original,) = jax.tree.leaves(state.inner_state.master)  # type: ignore[attr-defined]
    assert original.dtype == jnp.float32
    np.testing.assert_array_equal(original, wide["w"])


@pytest.mark.parametrize("master", [False, True])
def test_a_gradient_that_is_no_number_changes_nothing(master):
    begun = {"w": jnp.ones(3, jnp.bfloat16 if master else jnp.float32)}
    params, state = stepped(begun, 1, float("nan"), master=master)
    np.testing.assert_array_equal(params["w"], begun["w"])
    assert int(state.total_notfinite) == 1  # type: ignore[attr-defined]
