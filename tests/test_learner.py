import jax
import numpy as np
import pytest

from configs import algorithms
from rlrag.agents.workflow import Role
from rlrag.collection import Collected
from rlrag.data.task import open_task
from rlrag.learner import Learner, averaged, describe, minibatches, with_spread
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Adapters
from rlrag.model.parameters import initialize, joined
from rlrag.objectives.scoring import score
from rlrag.packing import Shape, pack
from rlrag.rewards.paid import Paid
from rlrag.setup import build_architecture, build_stages
from rlrag.trajectory import COMPLETED, OBSERVED, SAMPLED, SEARCH_FAILED, Example, Group, Span, Stream, Trajectory
from tests.episodes import make_groups
from tests.experiments import tiny

EXAMPLE = Example("q", "who?", ("a",))


def episode(status=COMPLETED, sampled=3):
    stream = Stream("agent", "agent")
    stream.add(Span("agent", OBSERVED, np.arange(2, dtype=np.int32)))
    zeros = np.zeros(sampled, np.float32)
    stream.add(Span("agent", SAMPLED, np.arange(sampled, dtype=np.int32), zeros, zeros, zeros))
    return Trajectory(EXAMPLE, streams=[stream], status=status)


@pytest.mark.parametrize(("num_micro", "count"), [(8, 1), (8, 2), (7, 3), (2, 5)])
def test_minibatches_part_the_micro_batches(num_micro, count):
    parts = minibatches(num_micro, count, seed=(3, 0))
    assert sorted(index for part in parts for index in part) == list(range(num_micro))
    assert len(parts) == min(count, num_micro)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == minibatches(num_micro, count, seed=(3, 0))


def test_epochs_take_another_order():
    assert minibatches(32, 4, seed=(3, 0)) != minibatches(32, 4, seed=(3, 1))


def test_what_a_batch_was_like():
    groups = [Group(EXAMPLE, [episode(), episode(SEARCH_FAILED, sampled=5)]), Group(EXAMPLE, [episode(sampled=1)])]
    amounts = [[1.0, 0.0], [0.5]]
    paid = [[Paid({"answer": [amount]}, metrics={"em": amount}) for amount in group] for group in amounts]
    packed = pack(groups, paid, {"agent": 0}, ("answer",), Shape(4, 16, 4, 1, 0, 1))
    values = averaged([describe(Collected(3, 2, groups, paid, [True, True], None, {}), packed)])
    assert values["staleness"] == 1.0
    assert values["reward"] == values["em"] == pytest.approx(0.5)
    assert values["trained_tokens"] == 4, "an episode whose search failed is not learned from"
    assert values["left_out"] == 1
    assert values["status/completed"] == pytest.approx(2 / 3)
    assert values["status/search_failed"] == pytest.approx(1 / 3)
    assert values["searches"] == 0.0


def test_second_moments_become_what_people_read():
    values = {"ratio": 1.0, "ratio_squared": 1.04, "value_target": 0.5, "value_target_squared": 0.5,
              "value_error_squared": 0.05}  # fmt: skip
    found = with_spread(values)
    assert found == {
        "ratio": 1.0, "ratio_std": pytest.approx(0.2), "value_target": 0.5, "explained_variance": pytest.approx(0.8),
    }  # fmt: skip


@pytest.fixture(scope="module")
def learners():
    """Learners of stages in which the policy has a critic of its own, a value head, or a partner."""
    task = open_task(tiny())

    def build(change, roles=None):
        experiment = tiny()
        change(experiment.main, experiment)
        main = build_stages(experiment, task)[1]
        if roles:
            learn = dict.fromkeys((role.model for role in roles.values()), main.recipe.learn["policy"])
            main = main._replace(recipe=main.recipe._replace(roles=roles, learn=learn))
        a = build_architecture(experiment, task)
        return Learner(main, a, make_mesh(devices=jax.devices()[:1]), 0, {"policy": initialize(a, jax.random.key(0))})

    return build


def collected(roles=("agent", "agent")):
    """Random groups of the tests' own, for the roles given, paid differently."""
    groups = make_groups(5, 4, 4, with_forced=False)
    for group in groups:
        for trajectory in group.trajectories:
            for stream in trajectory.streams:
                stream.role = roles[stream.role != "talker"]
                for span in stream.spans:
                    span.role, span.kept = stream.role, None
    dice = np.random.default_rng(0)
    paid = [
        [Paid({"answer": [float(dice.integers(2))] * len(t.streams)}) for t in group.trajectories] for group in groups
    ]
    return Collected(0, 0, groups, paid, [True] * 4, None, {})


def test_a_critic_of_its_own_begins_as_the_policy_and_learns_apart(learners):
    learner = learners(algorithms.ppo)
    assert set(learner.models) == {"policy", "critic"}
    assert set(learner.acting) == {"policy"}
    assert learner.models["policy"].value_head is None
    before = jax.device_get(learner.models)
    np.testing.assert_array_equal(before["critic"].embed, before["policy"].embed)
    assert (before["critic"].value_head == 0).all()
    values = learner.learn(collected(), 0).values
    after = learner.models
    assert (np.asarray(after["critic"].value_head) != 0).any()
    assert np.abs(np.asarray(after["critic"].embed) - np.asarray(after["policy"].embed)).max() > 0
    assert values["critic/explained_variance"] <= 0.01, "it said 0 of everything"
    assert values["critic/grad_norm"] > 0
    for step in range(1, 60):
        values = learner.learn(collected(), step).values
    assert values["critic/explained_variance"] > 0.3, "the same batch again and again is learned"


def test_a_value_head_on_the_trunk_learns_with_the_policy(learners):
    learner = learners(algorithms.ppo_trunk)
    assert set(learner.models) == {"policy"}
    assert (np.asarray(learner.models["policy"].value_head) == 0).all()
    values = learner.learn(collected(), 0).values
    assert (np.asarray(learner.models["policy"].value_head) != 0).any()
    assert {"loss/surrogate", "loss/value", "coefficient/value"} <= set(values)


def test_two_policies_learn_from_their_own_streams(learners):
    learner = learners(algorithms.grpo, {"talker": Role("first"), "chooser": Role("second")})
    before = jax.device_get(learner.models)
    assert set(before) == {"first", "second"}
    values = learner.learn(collected(("talker", "chooser")), 0).values
    for name in ("first", "second"):
        assert values[f"{name}/grad_norm"] > 0
        assert np.abs(np.asarray(learner.models[name].embed) - before[name].embed).max() > 0
    assert {"first/zero_variance_groups", "second/zero_variance_groups"} <= set(values)
    assert values["first/entropy/talker"] > 0
    assert "first/entropy/chooser" not in values


def test_two_adapters_learn_from_their_own_streams_and_the_base_stays(learners):
    """The reference is the base: what the model says without its adapters, bit by bit."""

    def adapted(main, experiment):
        algorithms.grpo(main, experiment)
        main.loss.kl, main.loss.reference = 0.1, "base"
        experiment.model.adapters = Adapters(rank=2, names="first,second")

    roles = {"talker": Role("policy", adapter="first"), "chooser": Role("policy", adapter="second")}
    learner = learners(adapted, roles)
    before = jax.device_get(learner.models["policy"])
    learner.learn(collected(("talker", "chooser")), 0)
    values = learner.learn(collected(("talker", "chooser")), 1).values
    after = jax.device_get(learner.models["policy"])
    jax.tree.map(np.testing.assert_array_equal, after.replace(adapters=None), before.replace(adapters=None))
    for name, low in after.adapters.layers.items():
        moved = np.abs(low.up - before.adapters.layers[name].up).max(axis=(0, 2, 3))
        assert (moved > 0).all(), f"both adapters have learned: {name}"
    assert values["kl"] != 0
    a = learner.programs.architectures["policy"]
    packed = learner.pack(collected(("talker", "chooser")).groups, collected().paid)[0]["policy"]
    micro = jax.tree.map(lambda leaf: leaf[0], packed.batch)
    silenced = joined(learner.references["policy"], learner.models["policy"])
    off = micro.replace(segments=micro.segments.replace(adapters=None))
    referred, base = (jax.jit(lambda p, b: score(p, a, b).logp)(*each) for each in (
        (silenced, micro), (after.replace(adapters=None), off)
    ))  # fmt: skip
    np.testing.assert_array_equal(referred, base)


def test_dropout_is_of_learning_and_another_in_every_step(learners):
    def dropping(share):
        def change(main, experiment):
            algorithms.grpo(main, experiment)
            experiment.model.adapters = Adapters(rank=2, dropout=share)

        return learners(change, {"talker": Role("policy", adapter="policy"), "agent": Role("policy", adapter="policy")})

    def learned(share, *steps):
        """Additions after one step of each number, from the same state."""
        learner = dropping(share)
        loud = jax.tree.map(lambda leaf: leaf + 0.1, learner.models["policy"].adapters)
        state = learner.states["policy"]
        begin = jax.device_get(state.replace(params=state.params.replace(adapters=loud)))
        for step in steps:
            learner.states["policy"] = jax.device_put(begin.replace(step=begin.step + step))
            learner.learn(collected(("talker", "agent")), 0)
            yield np.asarray(learner.models["policy"].adapters.layers["up"].down)

    (none,), (some, again, later) = learned(0, 0), learned(0.5, 0, 0, 1)
    assert (some == again).all() and (some != later).any() and (some != none).any()


def test_the_gap_is_that_of_the_policy_that_played(learners):
    """With several minibatches the later ones see a policy that has moved: their distance is not the sampler's."""

    def several(main, experiment):
        main.update.epochs, main.update.learning_rate = 3, 0.1

    one, three = learners(algorithms.grpo), learners(several)
    first, second = (learner.learn(collected(), 0).values for learner in (one, three))
    assert second["sampler_learner_gap"] == pytest.approx(first["sampler_learner_gap"])
    assert second["ratio_std"] > 1e-3
    assert first["ratio_std"] != second["ratio_std"]


def scored_by(learner, groups, paid):
    """log-probs [rows, T] of a batch under the learner's parameters as they are, and the packed batch."""
    packed = learner.pack(groups, paid)[0]["policy"]
    rows = packed.batch.tokens.shape[0] * packed.batch.tokens.shape[1]
    batch = jax.tree.map(lambda leaf: leaf.reshape(rows, *leaf.shape[2:]), packed.batch)
    a = learner.programs.architectures["policy"]
    return np.asarray(jax.jit(lambda p: score(p, a, batch).logp)(learner.models["policy"])), packed


def test_the_ratio_at_staleness_1_is_to_the_policy_that_played(learners):
    """Both batches are played by the first policy; the second is learned from by the next one, whose ratio must be
    exp(its log-prob - the one recorded), token by token."""
    learner = learners(lambda main, experiment: setattr(main.update, "learning_rate", 0.05))
    first, second = collected(), collected()
    logp, packed = scored_by(learner, second.groups, second.paid)
    for place in packed.places:  # what the sampler of version 0 would have recorded
        stream = [t for g in second.groups for t in g.trajectories][place.episode].streams[place.call]
        at = -place.start
        for span in stream.spans:
            if span.act == SAMPLED:
                columns = slice(place.column + at, place.column + at + len(span.tokens))
                span.logp = logp[place.row, columns].copy()
            at += len(span.tokens)
    learner.learn(first, 0)
    now, packed = scored_by(learner, second.groups, second.paid)
    act = packed.batch.act.reshape(-1, packed.batch.act.shape[-1])
    recorded = packed.batch.logp.reshape(act.shape)
    ratio = np.exp(now - recorded)[act > 0]
    second.step = 1
    values = learner.learn(second, 1).values
    assert values["staleness"] == 1.0
    assert ratio.std() > 0.05, "the policy has moved"
    assert values["ratio"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert values["ratio_std"] == pytest.approx(ratio.std(), rel=1e-3)
    assert values["ratio_max"] == pytest.approx(ratio.max(), rel=1e-4)
    outside = (ratio > 1.2) | (ratio < 0.8)
    assert 0 < values["clip_fraction"] == pytest.approx(outside.mean(), abs=1e-6)
