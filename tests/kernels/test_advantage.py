"""Every implementation of the recurrence, and returns and GAE on top of it, against loops over action tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.advantage import api, gae, linear_recurrence, returns

IMPLEMENTATIONS = list(api.IMPLEMENTATIONS)
RECURRENCE, RETURNS, GAE = (
    jax.jit(each, static_argnames="implementation") for each in (linear_recurrence, returns, gae)
)
GAMMA, LAM = 0.9, 0.8

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@implementations
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 37), (4, 128)], ids=str)
def test_recurrence_equals_a_loop(implementation, shape):
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=shape), rng.uniform(0, 1, shape) * (rng.random(shape) < 0.9)
    expected, following = np.zeros(shape), np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        following = b[:, t] + c[:, t] * following
        expected[:, t] = following
    got = RECURRENCE(b, c, implementation=implementation)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def packed(seed: int, rows: int = 5, tokens: int = 41):
    """Rows of segments of random lengths, padding behind, observed tokens anywhere, also at the ends of segments."""
    rng = np.random.default_rng(seed)
    segment, name = np.zeros((rows, tokens), np.int32), 0
    for row in range(rows):
        t, end = 0, rng.integers(tokens // 2, tokens + 1)
        while t < end:
            length, name = rng.integers(1, 12), name + 1
            segment[row, t : min(t + length, end)] = name
            t += length
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


@implementations
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(GAMMA, LAM), (1.0, 1.0), (1.0, 0.0)])
def test_returns_and_gae_equal_loops_over_actions(implementation, seed, gamma, lam):
    rewards, values, act, segment = packed(seed)
    expected = expected_advantages(rewards, values, act, segment, gamma, lam)
    got_returns = RETURNS(rewards, act, segment, gamma, implementation=implementation)
    got = GAE(rewards, values, act, segment, gamma, lam, implementation=implementation)
    for one, other in zip((got_returns, *got), expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@implementations
def test_documents_of_any_length_change_nothing(implementation):
    """The same actions with and without observed tokens between them earn the same."""
    rewards, values = jnp.array([[0.5, 0.0, 1.0]]), jnp.array([[0.1, 0.2, 0.3]])
    call = functools.partial(GAE, gamma=GAMMA, lam=LAM, implementation=implementation)
    short = call(rewards, values, jnp.ones((1, 3)), jnp.ones((1, 3)))
    places = np.array([2, 3, 9])

    def spread(x, rest):
        return jnp.full((1, 12), rest).at[:, places].set(x)

    # 7 in the observed places of rewards and values: neither is read there.
    long = call(spread(rewards, 7.0), spread(values, 7.0), spread(1, 0), jnp.ones((1, 12)))
    for one, other in zip(short, long):
        np.testing.assert_allclose(other[:, places], one, rtol=1e-6)
        assert np.count_nonzero(other) == np.count_nonzero(one)


@implementations
def test_episode_ids_let_credit_flow_across_segments(implementation):
    rewards, act = jnp.array([[0.0, 0.0, 0.0, 1.0]]), jnp.array([[1, 0, 0, 1]])
    call = functools.partial(RETURNS, rewards, act, gamma=GAMMA, implementation=implementation)
    np.testing.assert_allclose(call(segment=jnp.array([[1, 1, 2, 2]])), [[0, 0, 0, 1]])
    np.testing.assert_allclose(call(segment=jnp.array([[1, 1, 1, 1]])), [[GAMMA, 0, 0, 1]])


def test_wrong_arguments_name_the_values():
    rewards = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\) and \(2, 3\)"):
        returns(rewards, jnp.zeros((2, 4)), rewards, 1.0)
    with pytest.raises(ValueError, match="there are associative, reference"):
        linear_recurrence(rewards, rewards, implementation="fused")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        linear_recurrence(rewards, rewards[0])
