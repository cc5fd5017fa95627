import dataclasses

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


def lanes(new: np.ndarray, num_lanes: int = 3, max_tokens: int = 40) -> kv.Cache:
    """A cache of one layer whose last two lanes hold the two streams; its keys are those given, its values a hundred
    more."""
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=1, num_kv_heads=HEADS, head_dim=SIZE)
    cache = kv.empty(architecture, PAGES, PAGE, num_lanes, max_tokens)
    cache = cache._replace(keys=(filled(new),), values=(filled(new + 100),))
    for row, table in enumerate(TABLE):
        cache = kv.take_up(cache, num_lanes - 2 + row, jnp.asarray(table), PAGE)
    return cache


def test_a_lane_is_the_stream(new):
    cache = lanes(new)
    assert cache.lane_keys[0].shape == (3, HEADS, 2, SIZE, kv.TILE)
    assert cache.lane_values[0].shape == (3, HEADS, 2 * kv.TILE, SIZE)
    keys, values = (np.asarray(half[0])[1:] for half in cache[2:])
    in_order = keys.transpose(0, 2, 4, 1, 3).reshape(2, -1, HEADS, SIZE)[:, :11]
    np.testing.assert_array_equal(in_order, new)
    np.testing.assert_array_equal(values.swapaxes(1, 2)[:, :11], new + 100)
    positions = np.array([[0, 0, 0], [0, 10, 3], [9, 4, 4]])
    expected = np.take_along_axis(new, positions[1:, :, None, None], 1)
    keys, values = kv.read_lanes(cache.lane_keys[0], cache.lane_values[0], positions)
    np.testing.assert_array_equal(keys[1:], expected)
    np.testing.assert_array_equal(values[1:], expected + 100)


def test_writing_into_lanes_and_dropping_what_lies_past_their_end(new):
    cache = lanes(new)
    before = cache.lane_keys[0], cache.lane_values[0]
    past, more = 2 * kv.TILE, np.stack([new[0, 0], new[0, 1], new[1, 0]]) + 1000
    after = kv.write_lanes(*before, np.array([past, 33, past]), more, more)
    for lane in (0, 2):
        for old, changed in zip(before, after):
            np.testing.assert_array_equal(changed[lane], old[lane])
    keys, values = kv.read_lanes(*after, np.array([[0], [33], [0]]))
    np.testing.assert_array_equal(keys[1, 0], more[1])
    np.testing.assert_array_equal(values[1, 0], more[1])
    changes = (np.nan_to_num(old) != np.nan_to_num(changed) for old, changed in zip(before, after))
    assert sum(int(each.sum()) for each in changes) == 2 * HEADS * SIZE


def test_scattering_past_the_end_is_dropped(new):
    store = filled(new)
    past = PAGES * PAGE + np.arange(22).reshape(2, 11)
    np.testing.assert_array_equal(kv.scatter(store, past, new + 1), store)


def test_the_store_takes_the_dtype_of_the_model():
    cache = kv.empty(ARCHITECTURE, 6, PAGE, 2, 24)
    assert len(cache.keys) == len(cache.values) == ARCHITECTURE.num_layers
    assert {(leaf.shape, str(leaf.dtype)) for leaf in [*cache.keys, *cache.values]} == {((2, 24, 8), "float32")}
