"""Credit against sums over the ragged record, whatever the packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.objectives.credit import Scored, episode_rewards, group_relative, ones, per_token
from rlrag.packing import unpack
from rlrag.rewards.paid import Paid
from rlrag.trajectory import COMPLETED, FAILED
from tests.episodes import REWARDS, make_groups, pack_groups, pay

GROUPS = make_groups(11, 4, 5, statuses=(COMPLETED, COMPLETED, COMPLETED, FAILED))
PAID = pay(GROUPS, 2)
NUM_GROUPS, NUM_EPISODES = 4, 20


def rewards_by_hand() -> dict[int, tuple[int, float]]:
    """episode -> (group, mean over its calls of the sum of what each call is paid)."""
    rewards, episode = {}, 0
    for number, (group, payments) in enumerate(zip(GROUPS, PAID)):
        for trajectory, payment in zip(group.trajectories, payments):
            if trajectory.status == COMPLETED:
                table = np.array([payment.per_call[name] for name in REWARDS])
                rewards[episode] = (number, float(np.nansum(table, 0).mean()))
            episode += 1
    return rewards


def advantages_by_hand(epsilon: float = 1e-6, divide: bool = True) -> dict[int, float]:
    rewards, advantages = rewards_by_hand(), {}
    for group in range(NUM_GROUPS):
        members = {episode: reward for episode, (of, reward) in rewards.items() if of == group}
        values = np.array(list(members.values()))
        scale = np.std(values, ddof=1) + epsilon if divide and len(values) > 1 else 1.0
        for episode, reward in members.items():
            advantages[episode] = (reward - values.mean()) / scale
    return advantages


def credit_of(credit, **shape):
    packed = pack_groups(GROUPS, PAID, **shape)
    batch = jax.tree.map(jnp.array, packed.batch)
    weights, metrics = jax.jit(lambda b: credit(Scored({"m": b}, NUM_GROUPS, NUM_EPISODES)))(batch)
    return packed, weights["m"], metrics


@pytest.mark.parametrize("shape", [{}, {"rows": 1, "max_micro": 64, "tokens": 80}, {"tokens": 200, "max_segments": 3}])
def test_rewards_of_episodes(shape):
    packed = pack_groups(GROUPS, PAID, **shape)
    reward, group, present = episode_rewards(jax.tree.map(jnp.array, packed.batch), NUM_EPISODES)
    expected = rewards_by_hand()
    assert np.flatnonzero(present).tolist() == sorted(expected)
    for episode, (number, amount) in expected.items():
        assert int(group[episode]) == number
        assert float(reward[episode]) == pytest.approx(amount, abs=1e-6)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("shape", [{}, {"rows": 1, "max_micro": 64, "tokens": 80}])
def test_the_advantage_stands_on_every_trained_token_of_its_episode(shape, divide):
    packed, weights, metrics = credit_of(group_relative(divide=divide), **shape)
    expected = advantages_by_hand(divide=divide)
    by_stream, act = unpack(np.asarray(weights), packed.places), unpack(packed.batch.act, packed.places)
    for (episode, call), values in by_stream.items():
        wanted = np.where(act[episode, call] > 0, expected[episode], 0)
        np.testing.assert_allclose(values, wanted, atol=2e-5)
    assert (np.asarray(weights)[packed.batch.act == 0] == 0).all()
    assert float(metrics["zero_variance_groups"].value()) == 0.0


def test_groups_of_equal_rewards_get_exactly_nothing():
    paid = [[Paid({"answer": [0.1] * len(t.streams)}) for t in group.trajectories] for group in GROUPS]
    paid[2] = PAID[2]
    packed = pack_groups(GROUPS, paid)
    batch = jax.tree.map(jnp.array, packed.batch)
    weights, metrics = group_relative()(Scored({"m": batch}, NUM_GROUPS, NUM_EPISODES))
    group = per_token(batch.segments.group, batch)
    assert float(metrics["zero_variance_groups"].value()) == pytest.approx(0.75)
    assert (weights["m"][group != 2] == 0).all()
    assert (weights["m"][group == 2] != 0).any()


def test_a_group_that_is_not_there_is_not_counted():
    packed, _, _ = credit_of(group_relative())
    batch = jax.tree.map(jnp.array, packed.batch)
    weights, metrics = group_relative()(Scored({"m": batch}, 2 * NUM_GROUPS, 2 * NUM_EPISODES))
    assert float(metrics["zero_variance_groups"].count) == NUM_GROUPS
    np.testing.assert_array_equal(weights["m"], credit_of(group_relative())[1])


def test_bonuses_are_added_where_tokens_are_trained():
    paid = [
        [
            Paid(p.per_call, {"main": np.full(t.streams[0].num_tokens, 0.5)})
            for t, p in zip(group.trajectories, payments)
        ]
        for group, payments in zip(GROUPS, PAID)
    ]
    packed = pack_groups(GROUPS, paid)
    batch = jax.tree.map(jnp.array, packed.batch)
    weights, _ = group_relative()(Scored({"m": batch}, NUM_GROUPS, NUM_EPISODES))
    plain = credit_of(group_relative())[1]
    main = per_token(batch.segments.call, batch) == 0
    np.testing.assert_allclose(weights["m"] - plain, 0.5 * np.asarray(batch.trained * main), atol=1e-6)


def test_supervised_learning_counts_every_trained_token_alike():
    packed, weights, metrics = credit_of(ones())
    np.testing.assert_array_equal(weights, packed.batch.act > 0)
    assert metrics == {}
