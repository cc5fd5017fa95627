"""Copies of pages in decode lanes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.rollout import lanes
from rlrag.rollout.cache import MOST_TILES, TILE, Cache, empty, tiles
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


def in_order(keys: lanes.Tiles, values: lanes.Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Token after token, [B, S, K, H]."""
    return np.concatenate(keys, 3).transpose(0, 3, 1, 2), np.concatenate(values, 2).transpose(0, 2, 1, 3)


def test_a_lane_is_the_stream(new):
    cache = filled_lanes(new)
    assert [tile.shape for tile in cache.lane_keys[0]] == [(3, HEADS, SIZE, TILE)]
    assert [tile.shape for tile in cache.lane_values[0]] == [(3, HEADS, TILE, SIZE)]
    keys, values = in_order(cache.lane_keys[0], cache.lane_values[0])
    np.testing.assert_array_equal(keys[1:, :11], new)
    np.testing.assert_array_equal(values[1:, :11], new + 100)


def test_long_streams_have_as_many_tiles_that_are_larger():
    assert tiles(1) == (1, TILE)
    assert tiles(TILE + 1) == (2, TILE)
    assert tiles(MOST_TILES * TILE) == (MOST_TILES, TILE)
    assert tiles(MOST_TILES * TILE + 1) == (9, 2 * TILE)


def test_writing_into_lanes_and_dropping_what_lies_past_their_end(new):
    cache = filled_lanes(new, max_tokens=2 * TILE)
    before = cache.lane_keys[0], cache.lane_values[0]
    past, place = 2 * TILE, TILE + 33
    more = np.stack([new[0, 0], new[0, 1], new[1, 0]]) + 1000
    after = lanes.write(*before, np.array([past, place, past]), more, more)
    for old, changed in zip(map(np.copy, in_order(*before)), in_order(*after)):
        np.testing.assert_array_equal(changed[1, place], more[1])
        old[1, place] = changed[1, place]
        np.testing.assert_array_equal(changed, old)


@pytest.mark.parametrize("window", [None, 70])
def test_attention_equals_softmax_over_the_tokens_seen(window):
    """Ragged lengths over several tiles, an idle lane, NaN behind the longest stream's tile."""
    rng, B, K, N, H, n = np.random.default_rng(0), 5, 2, 6, 8, 5
    key, value = (rng.normal(size=(n, B, K, *shape)).astype(np.float32) for shape in ((H, TILE), (TILE, H)))
    key[4], value[4] = np.nan, np.nan
    tiled = tuple(map(jnp.asarray, key)), tuple(map(jnp.asarray, value))
    query = rng.normal(size=(B, N, H)).astype(np.float32)
    position, live = np.array([0, 63, 64, 255, 300]), np.array([True, True, True, True, False])
    out = lanes.attend(query, *tiled, jnp.asarray(position), jnp.asarray(live), window)
    for lane in range(4):
        low = max(0, position[lane] - window + 1) if window else 0
        for head in range(N):
            keys = key[:, lane, head // 3].swapaxes(1, 2).reshape(-1, H)[low : position[lane] + 1].astype(np.float64)
            values = value[:, lane, head // 3].reshape(-1, H)[low : position[lane] + 1].astype(np.float64)
            scores = keys @ query[lane, head] * H**-0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[lane, head], weights @ values / weights.sum(), rtol=2e-5, atol=2e-6)
    assert np.isfinite(out[4]).all()
