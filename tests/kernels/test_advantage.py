"""Every implementation of the recurrence, and returns and GAE on top of it, against loops over action tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import arg_specs, interpret
from kernels.advantage import api, associative, gae, mosaic_gpu, mosaic_tpu, reference, returns

IMPLEMENTATIONS = ["associative", "reference"]
# Chunks of 128 of the tokens of a row, so that segments end at, before and behind their borders.
KERNELS = {
    "mosaic_gpu": functools.partial(mosaic_gpu.gae, tile={"chunk": 128}),
    "mosaic_tpu": mosaic_tpu.gae,
}
RETURNS, GAE = (jax.jit(each, static_argnames=("implementation", "num_groups")) for each in (returns, gae))
GAMMA, LAM = 0.9, 0.8


@pytest.fixture(params=[*IMPLEMENTATIONS, *KERNELS])
def implementation(request, monkeypatch):
    """Its name; the kernels run in their interpreters."""
    name = request.param
    if name not in KERNELS:
        yield name
        return
    monkeypatch.setitem(api.IMPLEMENTATIONS, name, api.IMPLEMENTATIONS[name]._replace(run=KERNELS[name]))
    with interpret.interpreted():
        yield name


@pytest.mark.parametrize("recurrence", [associative.linear_recurrence, reference.linear_recurrence])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 37), (4, 128)], ids=str)
def test_recurrence_equals_a_loop(recurrence, shape):
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=shape), rng.uniform(0, 1, shape) * (rng.random(shape) < 0.9)
    expected, following = np.zeros(shape), np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        following = b[:, t] + c[:, t] * following
        expected[:, t] = following
    np.testing.assert_allclose(jax.jit(recurrence)(jnp.float32(b), jnp.float32(c)), expected, rtol=1e-5, atol=1e-5)


def packed(seed: int, rows: int = 9, tokens: int = 384):
    """Rows of segments of random lengths, padding behind, observed tokens anywhere, also at the ends of segments."""
    rng = np.random.default_rng(seed)
    segment, name = np.zeros((rows, tokens), np.int32), 0
    for row in range(rows):
        t, end = 0, rng.integers(tokens // 2, tokens + 1)
        while t < end:
            length, name = rng.choice([1, 5, 64, 128, 200]), name + 1
            segment[row, t : min(t + length, end)] = name
            t += length
    segment[-1] = name + 1  # one segment from the first token to the last
    act = rng.integers(0, 3, segment.shape)  # 0 observed, 1 sampled, 2 forced; padding may carry anything
    rewards, values = rng.normal(size=(2, *segment.shape)).astype(np.float32)
    return rewards, values, act, segment


def expected_advantages(rewards, values, act, segment, gamma, lam):
    """Episode by episode on the list of its actions, as in the textbook: returns, advantages, targets."""
    outputs = np.zeros((3, *segment.shape))
    for row in range(len(segment)):
        for name in set(segment[row]) - {0}:
            places = [t for t in range(segment.shape[1]) if segment[row, t] == name and act[row, t] > 0]
            rest, advantage, next_value = 0.0, 0.0, 0.0
            for t in reversed(places):
                rest = rewards[row, t] + gamma * rest
                advantage = rewards[row, t] + gamma * next_value - values[row, t] + gamma * lam * advantage
                next_value = float(values[row, t])
                outputs[:, row, t] = rest, advantage, advantage + next_value
    return outputs


@pytest.mark.parametrize(("seed", "gamma", "lam"), [(0, GAMMA, LAM), (1, 1.0, 1.0), (2, 1.0, 0.0)])
def test_returns_and_gae_equal_loops_over_actions(implementation, seed, gamma, lam):
    rewards, values, act, segment = packed(seed)
    expected = expected_advantages(rewards, values, act, segment, gamma, lam)
    got_returns = RETURNS(rewards, act, segment, gamma, implementation=implementation)
    got = GAE(rewards, values, act, segment, gamma, lam, implementation=implementation)
    for one, other in zip((got_returns.advantages, got.advantages, got.targets), expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for advantages, moments in ((expected[0], got_returns.moments), (expected[1], got.moments)):
        rows = [row[(act > 0) & (segment > 0)] for row, act, segment in zip(advantages, act, segment)]
        np.testing.assert_array_equal(moments.count, [len(row) for row in rows])
        np.testing.assert_allclose(moments.mean, [row.mean() for row in rows], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.spread, [row.var() * len(row) for row in rows], rtol=1e-4)
        every = np.concatenate(rows)
        merged = moments.merged()
        np.testing.assert_allclose(merged, (len(every), every.mean(), every.var() * len(every)), rtol=1e-4, atol=1e-5)


def test_moments_of_nothing_are_zero_and_an_offset_costs_no_digits(implementation):
    rewards, values, act, segment = packed(3)
    act[0] = 0
    got = GAE(1e4 + rewards, 0 * values, act, segment, 0.0, 0.0, implementation=implementation).moments
    assert [float(each[0]) for each in got] == [0, 0, 0]
    spread = [
        np.var(np.float64(np.float32(1e4) + r)[(a > 0) & (s > 0)]) for r, a, s in zip(rewards[1:], act[1:], segment[1:])
    ]
    np.testing.assert_allclose(got.spread[1:] / got.count[1:], spread, rtol=1e-4)


NUM_GROUPS = 130  # more than a vector of lanes holds


def test_moments_by_group_equal_those_of_float64(implementation):
    """Rewards 1000 +- 0.1; groups that cross rows and chunks, of one token, of none, and ids that are no group's."""
    rng = np.random.default_rng(4)
    _, _, act, segment = packed(4)
    rewards = (1000 + rng.choice([0, 0.1], segment.shape)).astype(np.float32)
    group = segment // 3 % 7 + 1
    group[segment % 5 == 0] = NUM_GROUPS - 1
    group[0, :2], act[0, :2], group[1, ::7], group[2, ::7] = 100, (1, 0), -1, NUM_GROUPS
    call = functools.partial(RETURNS, gamma=0.0, implementation=implementation)
    got = call(rewards, act, segment, group=group, num_groups=NUM_GROUPS)
    plain = call(rewards, act, segment)
    assert plain.groups is None
    np.testing.assert_array_equal(got.advantages, plain.advantages)
    counted = (act > 0) & (segment > 0)
    for name in range(NUM_GROUPS):
        inside = np.float64(rewards[counted & (group == name)])
        count, mean, spread = (float(each[name]) for each in got.groups)
        assert count == len(inside)
        if len(inside):
            assert mean == pytest.approx(inside.mean(), abs=7e-5), "a unit in the last place"
            assert spread == pytest.approx(inside.var() * len(inside), rel=1e-4, abs=1e-6)
        else:
            assert mean == spread == 0
    assert [float(got.groups.count[name]) for name in (0, 100)] == [0, 1]


def test_documents_of_any_length_change_nothing(implementation):
    """The same actions with and without observed tokens between them earn the same."""
    rewards, values = (jnp.zeros((1, 128)).at[0, :3].set(jnp.array(x)) for x in ([0.5, 0, 1], [0.1, 0.2, 0.3]))
    call = functools.partial(GAE, gamma=GAMMA, lam=LAM, implementation=implementation)
    act = (jnp.arange(128) < 3)[None]
    short = call(rewards, values, act, act)
    places = np.array([2, 127, 128])

    def spread(x, rest):
        return jnp.full((1, 256), rest).at[:, places].set(x)

    # 7 in the observed places of rewards and values: neither is read there.
    long = call(spread(rewards[:, :3], 7.0), spread(values[:, :3], 7.0), spread(1, 0), jnp.ones((1, 256)))
    for one, other in zip(short[:2], long[:2]):
        np.testing.assert_allclose(other[:, places], one[:, :3], rtol=1e-5, atol=1e-7)
        assert np.count_nonzero(other) == np.count_nonzero(one)


def test_episode_ids_let_credit_flow_across_segments(implementation):
    rewards, act = (jnp.zeros((1, 128), int).at[0, places].set(1) for places in ((3,), (0, 3)))
    call = functools.partial(RETURNS, rewards, act, gamma=GAMMA, implementation=implementation)
    for ids, wanted in (([1, 1, 2, 2], [0, 0, 0, 1]), ([1, 1, 1, 1], [GAMMA, 0, 0, 1])):
        segment = jnp.zeros((1, 128), int).at[0, :4].set(jnp.array(ids))
        np.testing.assert_allclose(call(segment=segment).advantages[0, :4], wanted, rtol=1e-6)


@pytest.mark.parametrize(("kernel", "platform"), [(mosaic_gpu, "cuda"), (mosaic_tpu, "tpu")], ids=list(KERNELS))
@pytest.mark.parametrize("spec", arg_specs.RECURRENCES[1:], ids=lambda spec: spec.name)
def test_kernels_lower_for_their_platform_at_real_shapes(kernel, platform, spec):
    assert kernel.refuses(spec.rows, spec.tokens) is None
    floats, ints = (jax.ShapeDtypeStruct((spec.rows, spec.tokens), dtype) for dtype in (jnp.float32, jnp.int32))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    traced = jax.jit(kernel.gae, static_argnums=7).trace(floats, floats, ints, ints, number, number, ints, 64)
    assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "128" in kernel.refuses(spec.rows, 100)
    assert "got 4096" in kernel.refuses(spec.rows, spec.tokens, 4096)


def test_wrong_arguments_name_the_values():
    rewards = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\), \(2, 3\)"):
        returns(rewards, jnp.zeros((2, 4)), rewards, 1.0)
    with pytest.raises(ValueError, match="num_groups is 0: give it with group"):
        returns(rewards, rewards, rewards, 1.0, group=rewards)
    with pytest.raises(ValueError, match="there are mosaic_gpu, mosaic_tpu, associative, reference"):
        gae(rewards, rewards, rewards, rewards, 1.0, 1.0, implementation="fused")
    with interpret.interpreted(), pytest.raises(ValueError, match="multiple of 128, got 3"):
        gae(rewards, rewards, rewards, rewards, 1.0, 1.0, implementation="mosaic_gpu")
