import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.rollout import cache as kv
from tests.rollout.rehearsal import ARCHITECTURE

PAGE, PAGES, HEADS, SIZE = 4, 10, 2, 3
TABLE = np.array([[7, 2, 5], [0, 9, 3]])  # pages of two streams, in order


@pytest.fixture
def new() -> np.ndarray:
    """Keys of eleven tokens of two streams, [B, C, K, H]."""
    return np.random.default_rng(0).normal(size=(2, 11, HEADS, SIZE)).astype(np.float32)


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


def test_the_view_is_the_stream(new):
    view = kv.gather(filled(new), TABLE, PAGE)
    assert view.shape == (HEADS, 2, 12, SIZE)
    np.testing.assert_array_equal(np.moveaxis(view, 0, 2)[:, :11], new)
    positions = np.array([[0, 10, 3], [9, 4, 4]])
    expected = np.take_along_axis(new, positions[..., None, None], 1)
    np.testing.assert_array_equal(kv.read(view, positions), expected)


def test_writing_into_the_view_and_dropping_what_lies_past_its_end(new):
    view = kv.gather(filled(new), TABLE, PAGE)
    changed = kv.write(view, np.array([[11, 2], [12, 99]]), new[:, :2] + 100)
    np.testing.assert_array_equal(kv.read(changed, np.array([[11, 2]] * 2))[0], new[0, :2] + 100)
    np.testing.assert_array_equal(np.asarray(changed)[:, 1], np.asarray(view)[:, 1])


def test_scattering_past_the_end_is_dropped(new):
    store = filled(new)
    past = PAGES * PAGE + np.arange(22).reshape(2, 11)
    np.testing.assert_array_equal(kv.scatter(store, past, new + 1), store)


def test_the_store_takes_the_dtype_of_the_model():
    cache = kv.empty(ARCHITECTURE, 6, PAGE)
    assert len(cache.keys) == len(cache.values) == ARCHITECTURE.num_layers
    assert {(leaf.shape, str(leaf.dtype)) for leaf in [*cache.keys, *cache.values]} == {((2, 24, 8), "float32")}
