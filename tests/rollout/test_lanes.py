"""Copies of pages in decode lanes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.rollout import lanes
from rlrag.rollout.cache import TILE, Cache, empty
from tests.rollout.rehearsal import ARCHITECTURE
from tests.rollout.test_cache import HEADS, PAGE, PAGES, SIZE, TABLE, filled, made


@pytest.fixture
def new() -> np.ndarray:
    return made()


def filled_lanes(new: np.ndarray, num_lanes: int = 3, max_tokens: int = 40) -> Cache:
    """A cache of one layer whose last two lanes hold the two streams; its keys are those given, its values a hundred
    more."""
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=1, num_kv_heads=HEADS, head_dim=SIZE)
    cache = empty(architecture, PAGES, PAGE, num_lanes, max_tokens)
    cache = cache._replace(keys=(filled(new),), values=(filled(new + 100),))
    for row, table in enumerate(TABLE):
        cache = lanes.take_up(cache, num_lanes - 2 + row, jnp.asarray(table), PAGE)
    return cache


def in_order(keys: jnp.ndarray, values: jnp.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token after token, [B, S, K, H]."""
    keys = np.asarray(keys).transpose(0, 2, 4, 1, 3)
    return keys.reshape(len(keys), -1, HEADS, SIZE), np.asarray(values).swapaxes(1, 2)


def test_a_lane_is_the_stream(new):
    cache = filled_lanes(new)
    assert cache.lane_keys[0].shape == (3, HEADS, 2, SIZE, TILE)
    assert cache.lane_values[0].shape == (3, HEADS, 2 * TILE, SIZE)
    keys, values = in_order(cache.lane_keys[0], cache.lane_values[0])
    np.testing.assert_array_equal(keys[1:, :11], new)
    np.testing.assert_array_equal(values[1:, :11], new + 100)


def test_writing_into_lanes_and_dropping_what_lies_past_their_end(new):
    cache = filled_lanes(new)
    before = cache.lane_keys[0], cache.lane_values[0]
    past, more = 2 * TILE, np.stack([new[0, 0], new[0, 1], new[1, 0]]) + 1000
    after = lanes.write(*before, np.array([past, 33, past]), more, more)
    for lane in (0, 2):
        for old, changed in zip(before, after):
            np.testing.assert_array_equal(changed[lane], old[lane])
    for half in in_order(*after):
        np.testing.assert_array_equal(half[1, 33], more[1])
    changes = (np.nan_to_num(old) != np.nan_to_num(changed) for old, changed in zip(before, after))
    assert sum(int(each.sum()) for each in changes) == 2 * HEADS * SIZE
