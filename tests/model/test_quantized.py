import jax
import jax.numpy as jnp
import numpy as np

from rlrag.model.quantized import numbers_of, quantize, times

MATRIX = jax.random.normal(jax.random.key(0), (3, 40, 24)) * jnp.logspace(-3, 2, 24)
X = jax.random.normal(jax.random.key(1), (7, 40))


def test_a_number_is_off_by_half_a_step_at_most():
    held = quantize(MATRIX)
    assert held.values.dtype == jnp.int8
    error = np.abs(np.asarray(numbers_of(held)) - np.asarray(MATRIX))
    step = np.abs(np.asarray(MATRIX)).max(1, keepdims=True) / 127
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert (np.abs(np.asarray(held.values)).max(1) == 127).all(), "each column uses its whole range"


def test_a_column_of_zeros_stays_zero():
    held = quantize(MATRIX.at[..., 5].set(0))
    assert np.isfinite(np.asarray(held.scale)).all()
    assert (np.asarray(numbers_of(held))[..., 5] == 0).all()


def test_products_are_those_of_the_numbers_that_stand_there():
    held = jax.tree.map(lambda leaf: leaf[1], quantize(MATRIX))
    expected = np.asarray(X, np.float64) @ np.asarray(numbers_of(held), np.float64)
    np.testing.assert_allclose(times(X, held), expected, rtol=2e-5, atol=1e-4)
    assert times(X.astype(jnp.bfloat16), held).dtype == jnp.bfloat16
    np.testing.assert_array_equal(times(X, MATRIX[1]), X @ MATRIX[1])
