"""Who plays what with which weights, what is accepted, what a restored collector goes on with; the engine is a stub."""

import json
import threading

import jax
import numpy as np
import pytest

from rlrag import config
from rlrag.collection import Collected, Collector, merged
from rlrag.data.sources import iterate
from rlrag.mesh import make_mesh
from rlrag.recipes.algorithm import rewards_differ
from rlrag.recipes.recipe import Recipe, Stage
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Example, Group, Trajectory

EXAMPLES = [Example(f"q{number}", "", ("a",)) for number in range(12)]


class StubEngine:
    """Groups of two, paid the example's number modulo 3 and 0: a third of them have no variance."""

    def __init__(self):
        self.played = []
        self.threads = set()
        self.usage = self

    def metrics(self):
        return {"tokens": 10.0, "tokens_per_s": 5.0}

    def run(self, weights, examples, play, root):
        self.played.append((weights["policy"], play.version, [e.id for e in examples], int(jax.random.bits(root))))
        self.threads.add(threading.current_thread().name.partition("_")[0])
        for example in examples:
            yield Group(example, [Trajectory(example, sample=s, policy_version=play.version) for s in range(2)])


def reward(group):
    amount = float(int(group.example.id[1:]) % 3)
    return [Paid({"answer": [amount]}), Paid({"answer": [0.0]})]


def collector(engine, *, first=0, accept=None, demonstrate=None, **settings):
    recipe = Recipe(lambda e, m: iter(()), {}, reward, ("answer",), None, {})  # type: ignore[arg-type]
    stage = Stage(
        "main", recipe, config.Stage(questions=2, group_size=2, **settings), 6, demonstrate=demonstrate, accept=accept
    )
    batches = iterate(EXAMPLES, seed=1, batch_size=2)
    return Collector(stage, engine, make_mesh(devices=jax.devices()[:1]), batches, jax.random.key(0), first)


def play(source, versions):
    """Take the steps; "weights" name the version they are of."""
    with source:
        return [source.take(step, step, lambda: {"policy": f"w{step}"}) for step in versions]  # noqa: B023


def test_on_policy_every_step_is_played_with_its_own_weights():
    engine = StubEngine()
    taken = play(collector(engine), range(6))
    assert [(weights, version) for weights, version, _, _ in engine.played] == [(f"w{n}", n) for n in range(6)]
    assert [c.step - c.version for c in taken] == [0] * 6
    assert sorted(e for _, _, examples, _ in engine.played for e in examples) == sorted(e.id for e in EXAMPLES)
    assert len({key for *_, key in engine.played}) == 6, "every step has dice of its own"
    assert engine.threads == {"MainThread"}


def test_one_step_off_every_step_but_the_first_is_played_with_the_weights_before():
    engine, on = StubEngine(), StubEngine()
    taken = play(collector(engine, one_step_off=True), range(6))
    play(collector(on), range(6))
    assert [(weights, version) for weights, version, _, _ in engine.played] == [
        ("w0", 0), ("w0", 0), ("w1", 1), ("w2", 2), ("w3", 3), ("w4", 4),
    ]  # fmt: skip
    assert [c.step - c.version for c in taken] == [0, 1, 1, 1, 1, 1]
    assert [t.policy_version for c in taken for t in c.groups[0].trajectories] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [p[2:] for p in engine.played] == [p[2:] for p in on.played], "the same questions and dice"
    assert engine.threads == {"MainThread", "collector"}


def test_a_restored_collector_learns_from_what_was_played_ahead():
    engine = StubEngine()
    source = collector(engine, one_step_off=True)
    with source:
        taken = [source.take(step, step, lambda: {"policy": "w"}) for step in range(3)]
        saved = json.loads(json.dumps({"cursor": taken[-1].cursor, **source.meta()}))
        rest = [source.take(step, step, lambda: {"policy": "w"}) for step in range(3, 6)]
    other = StubEngine()
    again = collector(other, first=3, one_step_off=True)
    with again:
        again.restore(saved["cursor"], saved["ahead"])
        found = [again.take(step, step, lambda: {"policy": "w"}) for step in range(3, 6)]
    assert found == rest
    assert [p[2:] for p in other.played] == [p[2:] for p in engine.played[4:]], "step 3 is not played again"


def test_demonstrations_are_made_ahead_and_again_after_a_restore():
    made = []

    def demonstrate(example, step):
        made.append((step, example.id))
        return Trajectory(example)

    with collector(StubEngine(), demonstrate=demonstrate) as source:
        taken = [source.take(step, 0, dict) for step in range(3)]
        assert source.meta() == {"ahead": None}
    with collector(StubEngine(), demonstrate=demonstrate, first=2) as again:
        again.restore(taken[1].cursor, None)
        assert again.take(2, 0, dict) == taken[2]
    assert all(c.version == c.step for c in taken)


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    engine = StubEngine()
    taken = play(collector(engine, accept=rewards_differ, dynamic_sampling=3), range(2))
    for collected in taken:
        groups, paid = collected.accepted()
        assert len(groups) == len(paid) == 2
        assert all(rewards_differ(group, payments) for group, payments in zip(groups, paid))
        assert len(collected.groups) >= len(groups)
    assert len(engine.played) > 2, "seed 1 has groups without variance among the first four"
    assert len({key for *_, key in engine.played}) == len(engine.played)


def test_dynamic_sampling_gives_up_with_a_full_batch():
    never = lambda group, payments: False  # noqa: E731
    (collected,) = play(collector(StubEngine(), accept=never, dynamic_sampling=3), range(1))
    assert len(collected.groups) == 6
    assert collected.accept == [True, True, False, False, False, False]


def test_what_raises_while_playing_ahead_is_raised():
    class Broken(StubEngine):
        def run(self, weights, examples, play, root):
            if self.played:
                raise ValueError("no retriever")
            yield from super().run(weights, examples, play, root)

    with pytest.raises(ValueError, match="no retriever"):
        play(collector(Broken(), one_step_off=True), range(2))


def test_usage_of_several_rollouts():
    found = merged([{"tokens": 10.0, "tokens_per_s": 5.0}, {"tokens": 30.0, "tokens_per_s": 1.0}])
    assert found == {"tokens": 40.0, "tokens_per_s": pytest.approx(2.0)}
    assert merged([{"tokens": 1.0}]) == {"tokens": 1.0}


def test_accepted_groups_keep_their_payments():
    groups = [Group(example, []) for example in EXAMPLES[:3]]
    paid = [[Paid({"n": [float(n)]})] for n in range(3)]
    chosen, payments = Collected(0, 0, groups, paid, [True, False, True], None, {}).accepted()
    assert [g.example.id for g in chosen] == ["q0", "q2"]
    np.testing.assert_array_equal([p[0].per_call["n"][0] for p in payments], [0, 2])
