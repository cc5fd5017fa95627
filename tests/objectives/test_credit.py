"""Credit against sums over the ragged record, whatever the packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.advantage import Moments
from rlrag.objectives.credit import (
    Scored,
    episode_rewards,
    gae,
    group_relative,
    leave_one_out,
    ones,
    per_token,
    rejection,
    returns,
    whitened,
)
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
    batches, metrics = jax.jit(lambda b: credit(scored(b)))(batch)
    return packed, batches["m"].weight, metrics


def scored(batch, num_groups=NUM_GROUPS, num_episodes=NUM_EPISODES) -> Scored:
    return Scored({"m": batch}, {"kl_reward": jnp.float32(0.1)}, num_groups, num_episodes)


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
    batches, metrics = group_relative()(scored(batch))
    weights = batches["m"].weight
    group = per_token(batch.segments.group, batch)
    assert float(metrics["zero_variance_groups"].value()) == pytest.approx(0.75)
    assert (weights[group != 2] == 0).all()
    assert (weights[group == 2] != 0).any()


def test_a_group_that_is_not_there_is_not_counted():
    packed, _, _ = credit_of(group_relative())
    batch = jax.tree.map(jnp.array, packed.batch)
    batches, metrics = group_relative()(scored(batch, 2 * NUM_GROUPS, 2 * NUM_EPISODES))
    assert float(metrics["zero_variance_groups"].count) == NUM_GROUPS
    np.testing.assert_array_equal(batches["m"].weight, credit_of(group_relative())[1])


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
    batches, _ = group_relative()(scored(batch))
    plain = credit_of(group_relative())[1]
    main = per_token(batch.segments.call, batch) == 0
    np.testing.assert_allclose(batches["m"].weight - plain, 0.5 * np.asarray(batch.trained * main), atol=1e-6)


def test_supervised_learning_counts_every_trained_token_alike():
    packed, weights, metrics = credit_of(ones())
    np.testing.assert_array_equal(weights, packed.batch.act > 0)
    assert metrics == {}


# -- the other kinds --------------------------------------------------------------------------------------------------


def by_stream(values, packed) -> dict:
    return unpack(np.asarray(values), packed.places)


def ends_by_hand() -> dict[tuple[int, int], float]:
    """(episode, call) -> what the call is paid."""
    paid, episode = {}, 0
    for group, payments in zip(GROUPS, PAID):
        for trajectory, payment in zip(group.trajectories, payments):
            if trajectory.status == COMPLETED:
                table = np.array([payment.per_call[name] for name in REWARDS])
                paid |= {(episode, call): float(amount) for call, amount in enumerate(np.nansum(table, 0))}
            episode += 1
    return paid


def test_leave_one_out_by_hand():
    packed, weights, _ = credit_of(leave_one_out())
    rewards = rewards_by_hand()
    act = by_stream(packed.batch.act, packed)
    for (episode, call), values in by_stream(weights, packed).items():
        group, reward = rewards[episode]
        others = [r for e, (g, r) in rewards.items() if g == group and e != episode]
        np.testing.assert_allclose(values[act[episode, call] > 0], reward - np.mean(others), atol=2e-5)


def test_group_means_are_the_baseline_of_reinforce():
    """GRPO with means alone = REINFORCE (gamma 1) with the group's mean as baseline, where every call is paid alike."""
    paid = [
        [Paid({"answer": [float(index)] * len(t.streams)}) for index, t in enumerate(group.trajectories)]
        for group in GROUPS
    ]
    batch = jax.tree.map(jnp.array, pack_groups(GROUPS, paid).batch)
    grpo, _ = group_relative(divide=False)(scored(batch))
    reinforce, _ = returns(baseline=True, whiten=False)(scored(batch))
    assert (np.asarray(grpo["m"].weight) != 0).any()
    np.testing.assert_allclose(grpo["m"].weight, reinforce["m"].weight, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_count_actions_from_the_end_of_a_call(gamma):
    packed, weights, _ = credit_of(returns(gamma, whiten=False))
    act, ends = by_stream(packed.batch.act, packed), ends_by_hand()
    for (episode, call), values in by_stream(weights, packed).items():
        actions = act[episode, call] > 0
        wanted = ends[episode, call] * gamma ** np.arange(actions.sum())[::-1]
        np.testing.assert_allclose(values[actions], wanted, atol=1e-5)


def test_gae_of_a_critic_that_says_nothing_is_the_return():
    _, weights, _ = credit_of(gae(1.0, 1.0, whiten=False))
    np.testing.assert_allclose(weights, credit_of(returns(1.0, whiten=False))[1], atol=1e-5)


def test_gae_and_targets_of_every_call_by_hand():
    """The recursion over action tokens, backwards, in float64; targets are advantages plus values."""
    gamma, lam = 0.97, 0.8
    packed = pack_groups(GROUPS, PAID)
    value = jnp.array(np.random.default_rng(4).normal(size=packed.batch.act.shape), jnp.float32)
    batches, _ = gae(gamma, lam, whiten=False)(scored(jax.tree.map(jnp.array, packed.batch).replace(value=value)))
    act, ends = by_stream(packed.batch.act, packed), ends_by_hand()
    values, found = by_stream(value, packed), by_stream(batches["m"].weight, packed)
    targets = by_stream(batches["m"].target, packed)
    for key, advantage in found.items():
        actions = np.flatnonzero(act[key] > 0)
        following, behind = 0.0, 0.0
        for place, at in reversed(list(enumerate(actions))):
            reward = ends[key] if place == len(actions) - 1 else 0.0
            v = float(values[key][at])
            following = reward + gamma * behind - v + gamma * lam * following
            assert advantage[at] == pytest.approx(following, abs=1e-4)
            assert targets[key][at] == pytest.approx(following + v, abs=1e-4)
            behind = v


def test_whitened_tokens_have_mean_0_and_variance_1():
    packed, weights, _ = credit_of(returns())
    trained = packed.batch.act > 0
    chosen = np.asarray(weights, np.float64)[trained]
    assert chosen.mean() == pytest.approx(0, abs=1e-5)
    assert chosen.var() == pytest.approx(1, abs=1e-4)
    plain = np.asarray(credit_of(returns(whiten=False))[1])[trained]
    np.testing.assert_allclose(chosen, (plain - plain.mean()) / plain.std(), atol=1e-4)
    alike = Moments(jnp.full(2, 3.0), jnp.ones(2), jnp.zeros(2))
    assert (whitened(jnp.ones((2, 3)), jnp.ones((2, 3)), alike) == 0).all()


def test_rejection_takes_good_episodes_whole():
    threshold = float(np.median([reward for _, reward in rewards_by_hand().values()]))
    packed, weights, _ = credit_of(rejection(threshold))
    act = by_stream(packed.batch.act, packed)
    kept = [reward >= threshold - 1e-6 for _, reward in rewards_by_hand().values()]
    assert 0 < sum(kept) < len(kept)
    for (episode, call), values in by_stream(weights, packed).items():
        reward = rewards_by_hand()[episode][1]
        if abs(reward - threshold) > 1e-5:
            np.testing.assert_array_equal(values, (act[episode, call] > 0) * float(reward >= threshold))


@pytest.mark.parametrize("kind", [group_relative, leave_one_out, returns, gae])
def test_a_penalty_on_the_divergence_is_part_of_the_reward(kind):
    """Episode by episode (its tokens' sum) or token by token, with the recipe's coefficient."""
    packed = pack_groups(GROUPS, PAID)
    batch = jax.tree.map(jnp.array, packed.batch)
    draw = lambda seed: jnp.array(np.random.default_rng(seed).normal(size=batch.act.shape), jnp.float32)  # noqa: E731
    batch = batch.replace(old_logp=draw(1), ref_logp=draw(2))
    options = {"whiten": False} if kind in (returns, gae) else {}
    found, metrics = kind(kl_reward="k1", **options)(scored(batch))
    k1 = np.asarray(batch.old_logp - batch.ref_logp) * np.asarray(batch.trained)
    assert float(metrics["kl_reward"].value()) == pytest.approx(k1.sum() / float(batch.trained.sum()), rel=1e-4)
    if kind in (returns, gae):  # tokens' own rewards, as a bonus is
        same, _ = kind(**options)(scored(batch.replace(bonus=-0.1 * k1)))
    else:
        of_episode = {key[0]: 0.0 for key in by_stream(k1, packed)}
        for (episode, _), values in by_stream(k1, packed).items():
            of_episode[episode] += float(values.sum())
        more = np.array([of_episode.get(episode, 0.0) for episode in range(NUM_EPISODES)])
        segments = batch.segments
        amount = jnp.array(-0.1 * more, jnp.float32)[jnp.maximum(segments.episode, 0)][..., None]
        first = jnp.arange(segments.rewards.shape[-1]) == jnp.argmax(segments.valid, -1)[..., None]
        changed = segments.rewards + jnp.where(first & segments.valid, amount, 0.0)
        same, _ = kind()(scored(batch.replace(segments=segments.replace(rewards=changed))))
    np.testing.assert_allclose(found["m"].weight, same["m"].weight, atol=2e-4)


@pytest.mark.parametrize("kind", [group_relative, leave_one_out, returns])
def test_a_group_without_variance_teaches_nothing(kind):
    """0.1 is no sum of powers of two: a mean of such rewards is off by a rounding, and must not become an advantage."""
    paid = [[Paid({"answer": [0.1] * len(t.streams)}) for t in group.trajectories] for group in GROUPS]
    batch = jax.tree.map(jnp.array, pack_groups(GROUPS, paid).batch)
    options = {"baseline": True, "whiten": False} if kind is returns else {}
    batches, metrics = kind(**options)(scored(batch))
    assert (batches["m"].weight == 0).all()
    assert float(metrics["zero_variance_groups"].value()) == 1.0
