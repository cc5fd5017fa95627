import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.rollout import cache as kv
from tests.rollout.rehearsal import ARCHITECTURE

PAGE, PAGES, HEADS, SIZE = 4, 10, 2, 3
TABLE = np.array([[7, 2, 5], [0, 9, 3]])  # pages of two streams, in order


def made() -> np.ndarray:
    """Keys of eleven tokens of two streams, [B, C, K, H]."""
    return np.random.default_rng(0).normal(size=(2, 11, HEADS, SIZE)).astype(np.float32)


@pytest.fixture
def new() -> np.ndarray:
    return made()


def filled(new: np.ndarray) -> jnp.ndarray:
    store = jnp.full((HEADS, PAGES * PAGE, SIZE), np.nan)
    positions = np.broadcast_to(np.arange(11), (2, 11))
    return kv.scatter(store, kv.token_index(TABLE, positions, PAGE), new)


def test_pages_hold_tokens_in_order(new):
    store = filled(new)
    for row, pages in enumerate(TABLE):
        for position in range(11):
            place = pages[position // PAGE] * PAGE + position % PAGE
            np.testing.assert_array_equal(store[:, place], new[row, position])
    assert np.isnan(store).sum() == HEADS * SIZE * (PAGES * PAGE - 22), "other places are untouched"


def test_scattering_past_the_end_is_dropped(new):
    store = filled(new)
    past = PAGES * PAGE + np.arange(22).reshape(2, 11)
    np.testing.assert_array_equal(kv.scatter(store, past, new + 1), store)


def test_the_store_takes_the_dtype_of_the_model():
    cache = kv.empty(ARCHITECTURE, 6, PAGE, 2, 24)
    assert len(cache.keys) == len(cache.values) == ARCHITECTURE.num_layers
    assert {(leaf.shape, str(leaf.dtype)) for leaf in [*cache.keys, *cache.values]} == {((2, 24, 8), "float32")}
