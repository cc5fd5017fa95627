"""Sampling as a round's inbox says it, and the uniform numbers it is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chisquare

from kernels.uncertainty import Filters
from kernels.uncertainty import sample as kernel
from rlrag.rollout.sampling import Controls, sample


def test_controls_say_how_to_sample():
    dice = np.random.default_rng(0)
    logits, uniform = dice.normal(size=(4, 50)).astype(np.float32), dice.random(4, np.float32)
    allowed = np.full((4, 3), -1)
    allowed[3, :2] = 7, 9
    controls = Controls(np.float32([1, 0, 0.5, 1]), np.array([0, 0, 2, 0]), np.float32([1, 1, 0.9, 1]), allowed)
    got = jax.jit(sample)(logits, uniform, controls)
    wanted = kernel(logits, uniform, controls.temperature, Filters(*controls[1:]), masked=False)
    assert int(got.token[1]) == logits[1].argmax()
    assert int(got.token[3]) in (7, 9)
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@partial(jax.jit, static_argnums=0)
def uniforms(count: int, root: jax.Array) -> jax.Array:
    """As `advance` draws them: one number for each (stream, position)."""
    streams, positions = jnp.arange(count, dtype=jnp.uint32), jnp.arange(100)
    keys = jax.vmap(partial(jax.random.fold_in, root))(streams)
    return jax.vmap(lambda key: jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(positions))(keys)


def test_uniforms_of_streams_and_positions_are_independent():
    u = np.asarray(uniforms(300, jax.random.key(0)))
    assert len(np.unique(u)) > 0.99 * u.size
    counts, _ = np.histogram(u, 50, (0, 1))
    assert chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
