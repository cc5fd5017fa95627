"""The optimizer on narrow parameters against the same in float64, and the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlrag.objectives.optimizer import build_optimizer, build_schedule, with_master_weights

STEPS, RATE = 400, 1e-4
GRADIENTS = np.random.default_rng(0).normal(0.3, 1.0, (STEPS, 7)).astype(np.float32)
SETTINGS = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.5, "clip_norm": 1.0}
START = jnp.asarray(np.linspace(0.5, 2.0, 7), jnp.bfloat16)


def adamw(start: np.ndarray, dtype=np.float64, b1=0.9, b2=0.99, decay=0.1, epsilon=1e-8) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, in float64; parameters rounded to dtype after every step."""
    x, m, v = start.astype(np.float64), 0.0, 0.0
    for number, g in enumerate(GRADIENTS.astype(np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**number)) / (np.sqrt(v / (1 - b2**number)) + epsilon)
        x = (x - RATE * (step + decay * x)).astype(dtype).astype(np.float64)
    return x


def run(optimizer, start) -> np.ndarray:
    """As rlrag.objectives.update.apply steps: an update is added in float32 and rounded once."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return ((params.astype(jnp.float32) + updates).astype(params.dtype), state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), GRADIENTS))()
    return np.asarray(params, np.float64)


def build(master):
    return build_optimizer(
        optax.constant_schedule(RATE), b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1e9, master=master
    )


def test_small_steps_of_bfloat16_parameters_add_up():
    """Each step is below half a unit in the last place of most parameters: without originals they stand still."""
    start = np.asarray(START, np.float64)
    wanted, without, found = adamw(start), adamw(start, jnp.bfloat16), run(build(True), START)
    np.testing.assert_allclose(found, wanted, atol=0, rtol=2**-8)
    assert np.abs(without - wanted).max() > 5 * np.abs(found - wanted).max()


def test_float32_parameters_need_no_originals():
    start = START.astype(jnp.float32)
    np.testing.assert_allclose(run(build(False), start), adamw(np.asarray(start)), rtol=1e-5)


def test_parameters_changed_from_outside_are_led_back_to_their_originals():
    """An update leads from where a parameter is, not from where it was left."""
    optimizer = with_master_weights(optax.sgd(0.5))
    state = optimizer.init(START)
    updates, _ = optimizer.update(jnp.ones(7), state, START + 1)
    np.testing.assert_allclose(START.astype(jnp.float32) + 1 + updates, START.astype(jnp.float32) - 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("constant", [0.25, 1.0, 1.0, 1.0]), ("linear", [0.25, 1.0, 0.6, 0.2]), ("cosine", [0.25, 1.0, 0.6, 0.2])],
)
def test_the_rate_rises_then_falls_as_named(kind, wanted):
    schedule = build_schedule(kind, 1.0, 4, 14, 0.2)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 4, 9, 14)], wanted, atol=1e-6)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"update\.schedule is 'steps': choose constant, cosine or linear"):
        build_schedule("steps", 1.0, 0, 10, 0.0)


def stepped(params, steps: int, gradient=1.0, **options):
    """The parameters after so many steps of 1e-4 each, and the state."""
    optimizer = build_optimizer(optax.constant_schedule(1e-4), **SETTINGS, **options)
    state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, gradient), params)  # float32, as they are summed
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("master", [False, True])
def test_a_gradient_that_is_no_number_changes_nothing(master):
    begun = {"w": jnp.ones(3, jnp.bfloat16 if master else jnp.float32)}
    params, state = stepped(begun, 1, float("nan"), master=master)
    np.testing.assert_array_equal(params["w"], begun["w"])
    assert int(state.total_notfinite) == 1  # type: ignore[attr-defined]
