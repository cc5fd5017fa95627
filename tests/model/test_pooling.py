import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.model.pooling import POOLINGS, normalized, pooled

SEGMENT = np.array([[1, 1, 1, 2, 2, 0], [3, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
HIDDEN = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooling_equals_numpy(pooling, dtype):
    hidden = jnp.asarray(HIDDEN, dtype)
    vectors = pooled(hidden, jnp.asarray(SEGMENT), 5, pooling)
    assert vectors.shape == (3, 5, 4)
    assert vectors.dtype == jnp.float32
    for row in range(3):
        for number in range(1, 5):
            mine = np.asarray(hidden[row], np.float64)[SEGMENT[row] == number]
            take = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}[pooling]
            wanted = take(mine) if len(mine) else np.zeros(4)
            np.testing.assert_allclose(vectors[row, number], wanted, atol=1e-6)


def test_an_unknown_pooling_is_named():
    with pytest.raises(ValueError, match="pooling is 'max': choose cls, mean, last"):
        pooled(HIDDEN, SEGMENT, 2, "max")


def test_normalizing_gives_length_one_and_leaves_zeros():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-8, 0.0]])
    np.testing.assert_allclose(normalized(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: normalized(x)[:, 0].sum())(x)).all()
