"""Group statistics against a loop over groups: ragged groups, invalid members, equal rewards, shuffled order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.advantage import group_leave_one_out, group_moments, group_zscore

NUM_GROUPS = 6


def members():
    """Groups of 5, 1, 4 (equal rewards whose float32 mean is not that reward), 3 with 2 invalid, 2, and none."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(5), [5, 1, 7, 3, 2])
    rewards = rng.normal(size=len(group)).astype(np.float32)
    rewards[group == 2] = 0.1
    valid = np.ones(len(group), bool)
    valid[np.flatnonzero(group == 3)[:2]] = False
    rewards[~valid] = np.nan  # what an invalid member holds must not matter
    order = rng.permutation(len(group))
    return rewards[order], group[order], valid[order]


def expected_zscore(rewards, group, valid, epsilon, ddof, divide):
    scores = np.zeros(len(rewards))
    for name in range(NUM_GROUPS):
        chosen = valid & (group == name)
        inside = rewards[chosen].astype(np.float64)
        if len(inside) > 1 and np.ptp(inside) > 0:
            divisor = inside.std(ddof=ddof) + epsilon if divide else 1.0
            scores[chosen] = (inside - inside.mean()) / divisor
    return scores


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_zscore_equals_a_loop_over_groups(ddof, divide, epsilon):
    rewards, group, valid = members()
    call = functools.partial(group_zscore, num_groups=NUM_GROUPS, epsilon=epsilon, ddof=ddof, divide=divide)
    expected = expected_zscore(rewards, group, valid, epsilon, ddof, divide)
    np.testing.assert_allclose(jax.jit(call)(rewards, group, valid), expected, rtol=1e-5, atol=1e-6)


def test_groups_that_say_nothing_give_exactly_zero():
    rewards, group, valid = members()
    got = np.asarray(group_zscore(rewards, group, valid, NUM_GROUPS))
    assert not got[np.isin(group, [1, 2, 3])].any()
    assert got[np.isin(group, [0, 4])].all()


def test_zscore_keeps_precision_under_a_large_common_reward():
    rewards, group = jnp.array([1000.0, 1001.0, 1002.0]), jnp.zeros(3, jnp.int32)
    np.testing.assert_allclose(group_zscore(rewards, group, group == 0, 1), [-1, 0, 1], rtol=1e-5)


def test_moments_of_many_rewards_are_those_of_float64():
    """What the order of a float32 sum has cost the mean is given back."""
    rng = np.random.default_rng(0)
    rewards, group = (1000 + rng.choice([0, 0.1], 20_000)).astype(np.float32), np.arange(20_000) % 3
    got = jax.jit(functools.partial(group_moments, num_groups=3))(rewards, group - 1, group > 0)
    for name in range(2):
        inside = np.float64(rewards[group == name + 1])
        assert got.count[name] == len(inside)
        np.testing.assert_allclose(got.mean[name], inside.mean(), rtol=1e-7)
        np.testing.assert_allclose(got.spread[name], inside.var() * len(inside), rtol=1e-4)
    assert [float(each[2]) for each in got] == [0, 0, 0]


def test_leave_one_out_equals_a_loop_over_groups():
    rewards, group, valid = members()
    expected = np.zeros(len(rewards))
    for i in np.flatnonzero(valid):
        others = valid & (group == group[i]) & (np.arange(len(group)) != i)
        if others.any():
            expected[i] = rewards[i] - rewards[others].astype(np.float64).mean()
    got = jax.jit(group_leave_one_out, static_argnums=3)(rewards, group, valid, NUM_GROUPS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistic", [group_zscore, group_leave_one_out])
def test_a_group_outside_the_range_is_not_valid(statistic):
    rewards, group = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([-1, 0, 0, 1])
    got = statistic(rewards, group, jnp.ones(4, bool), 1)
    assert got[0] == got[3] == 0
    assert got[1] == -got[2] != 0


def test_wrong_arguments_name_the_values():
    with pytest.raises(ValueError, match=r"\(4,\), \(3,\) and \(4,\)"):
        group_zscore(jnp.zeros(4), jnp.zeros(3, jnp.int32), jnp.ones(4, bool), 1)
    with pytest.raises(ValueError, match="got 2"):
        group_zscore(jnp.zeros(4), jnp.zeros(4, jnp.int32), jnp.ones(4, bool), 1, ddof=2)
