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
    keys, values = np.asarray(keys).transpose(1, 0, 4, 2, 3), np.asarray(values).transpose(1, 0, 3, 2, 4)
    return keys.reshape(len(keys), -1, HEADS, SIZE), values.reshape(len(values), -1, HEADS, SIZE)


def test_a_lane_is_the_stream(new):
    cache = filled_lanes(new)
    assert cache.lane_keys[0].shape == (1, 3, HEADS, SIZE, TILE)
    assert cache.lane_values[0].shape == (1, 3, HEADS, TILE, SIZE)
    keys, values = in_order(cache.lane_keys[0], cache.lane_values[0])
    np.testing.assert_array_equal(keys[1:, :11], new)
    np.testing.assert_array_equal(values[1:, :11], new + 100)


def test_writing_into_lanes_and_dropping_what_lies_past_their_end(new):
    cache = filled_lanes(new)
    before = cache.lane_keys[0], cache.lane_values[0]
    past, more = TILE, np.stack([new[0, 0], new[0, 1], new[1, 0]]) + 1000
    after = lanes.write(*before, np.array([past, 33, past]), more, more)
    for lane in (0, 2):
        for old, changed in zip(before, after):
            np.testing.assert_array_equal(changed[:, lane], old[:, lane])
    for half in in_order(*after):
        np.testing.assert_array_equal(half[1, 33], more[1])
    changes = (np.nan_to_num(old) != np.nan_to_num(changed) for old, changed in zip(before, after))
    assert sum(int(each.sum()) for each in changes) == 2 * HEADS * SIZE


@pytest.mark.parametrize("window", [None, 70])
def test_attention_equals_softmax_over_the_tokens_seen(window):
    """Ragged lengths over several tiles, an idle lane, NaN behind the longest stream's tile."""
    rng, B, K, N, H, n = np.random.default_rng(0), 5, 2, 6, 8, 5
    key, value = (rng.normal(size=(n, B, K, *shape)).astype(np.float32) for shape in ((H, TILE), (TILE, H)))
    key[4], value[4] = np.nan, np.nan
    query = rng.normal(size=(B, N, H)).astype(np.float32)
    position, live = np.array([0, 63, 64, 255, 300]), np.array([True, True, True, True, False])
    out = lanes.attend(query, jnp.asarray(key), jnp.asarray(value), jnp.asarray(position), jnp.asarray(live), window)
    for lane in range(4):
        low = max(0, position[lane] - window + 1) if window else 0
        for head in range(N):
            keys = key[:, lane, head // 3].swapaxes(1, 2).reshape(-1, H)[low : position[lane] + 1].astype(np.float64)
            values = value[:, lane, head // 3].reshape(-1, H)[low : position[lane] + 1].astype(np.float64)
            scores = keys @ query[lane, head] * H**-0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[lane, head], weights @ values / weights.sum(), rtol=2e-5, atol=2e-6)
    assert np.isfinite(out[4]).all()
