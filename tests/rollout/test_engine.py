"""The fast engine plays what the naive one plays, whatever the slots, the devices and the order of arrival."""

import jax
import numpy as np
import pytest

from rlrag.agents.workflow import Allowed, Generate, Role, Sampling, Search, Together, Tool
from rlrag.mesh import make_mesh
from rlrag.model.decoding import pack
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import COMPLETED, FAILED, SAMPLED, SEARCH_FAILED, Example, Outcome
from tests.rollout.rehearsal import (
    ARCHITECTURE,
    END,
    SPEC,
    VOCABULARY,
    Naive,
    SlowSearcher,
    decode,
    document,
    fingerprint,
    parameters,
    print_fingerprint,
    roll_out,
)


@pytest.fixture(scope="module")
def reference() -> list:
    naive = Naive(parameters())
    return [[naive.episode(Example(f"q{i}", "", ("",)), sample) for sample in range(2)] for i in range(6)]


@pytest.mark.parametrize(
    "changes",
    [
        {"most_s": 0.01},
        {"num_slots": 3, "burst": 1, "most_s": 0.01},
        {"num_slots": 16, "burst": 9, "prefill_rows": 2, "prefill_chunk": 17},
        {"num_slots": 4, "num_pages": 60, "most_s": 0.01},  # pages are taken from waiting streams
        {"page_size": 192, "num_pages": 24},  # contiguous: one page a stream
    ],
    ids=["late", "few_slots", "long_burst", "few_pages", "contiguous"],
)
def test_equals_naive_engine(reference, changes):
    groups = roll_out(6, 2, **changes)
    for group, expected in zip(groups, reference, strict=True):
        for trajectory, naive in zip(group.trajectories, expected, strict=True):
            assert len(trajectory.streams) == len(naive.streams) == 2
            for stream in naive.streams:
                mine = next(s for s in trajectory.streams if s.name == stream.name)
                np.testing.assert_array_equal(mine.tokens, stream.tokens)
                np.testing.assert_array_equal(mine.act, stream.act)
            assert trajectory.outcome.answer == naive.outcome.answer
    sampled = sum(t.num_sampled for group in groups for t in group.trajectories)
    assert sampled > 200


def test_equal_on_eight_devices(run_on_devices):
    printed = run_on_devices(print_fingerprint, 8)
    assert printed.split()[-1] == fingerprint(roll_out(6, 2))


def play(workflow, *, searcher=None, models=("m",), roles=None, examples=2, group_size=1, tools=None):
    """A rollout of a test's own workflow: the groups, the engine and its decoders."""
    decoders = {name: Decoder(ARCHITECTURE, SPEC, VOCABULARY, END, make_mesh()) for name in models}
    engine = Engine(decoders, decode, searcher, max_episodes=8)
    settings = Play(workflow, roles or {"r": Role("m")}, group_size=group_size, tools=tools or {})
    weights = dict.fromkeys(models, pack(parameters(), ARCHITECTURE))
    asked = [Example(f"q{i}", "", ("",)) for i in range(examples)]
    try:
        return list(engine.run(weights, asked, settings, jax.random.key(0))), engine
    finally:
        engine.close()
        assert all(decoder.idle for decoder in decoders.values())
        assert all(pages.num_held == 0 for decoder in decoders.values() for pages in decoder.pages), "pages leaked"


def test_groups_share_the_prompt():
    """Samples of one question cache their common prompt once."""

    def workflow(example, mode):
        yield Generate("s", "r", list(range(1, 23)), (), 3)
        return Outcome(None)

    _, engine = play(workflow, examples=1, group_size=8)
    # 22 prompt tokens: the newest is decoded, five pages of four are shared, one token is each sample's own.
    assert engine.decoders["m"].usage.shared_tokens == 7 * 20
    assert engine.decoders["m"].usage.prefill_tokens == 21 + 7


def test_two_models():
    """A role's streams live in its own model's decoder; what is sampled does not depend on who shares a decoder."""

    def workflow(example, mode):
        first = yield Generate("one", "r", [1, 2, 3], (), 6)
        second = yield Generate("two", "s", [*first.tokens, 4], (), 6)
        third = yield Generate("one", "r", second.tokens, (), 6)
        return Outcome(third.text)

    together, _ = play(workflow, roles={"r": Role("m"), "s": Role("m")})
    apart, engine = play(workflow, models=("m", "n"), roles={"r": Role("m"), "s": Role("n")})
    assert [g.trajectories[0].outcome.answer for g in apart] == [g.trajectories[0].outcome.answer for g in together]
    assert engine.decoders["n"].usage.live_lane_steps == 12


def test_failed_search_is_shown_and_marked():
    class Broken:
        def search(self, queries, k, scopes=None):
            raise TimeoutError("too slow")

    def workflow(example, mode):
        found = yield Search(("a", "b"), 3)
        assert found.passages == [[], []]
        return Outcome(found.error)

    groups, _ = play(workflow, searcher=Broken())
    trajectory = groups[0].trajectories[0]
    assert trajectory.status == SEARCH_FAILED
    assert trajectory.outcome.answer == "TimeoutError: too slow" == trajectory.searches[0].error


def test_tools_run_on_host_threads():
    def workflow(example, mode):
        both = yield Together((Tool("add", {"a": 1, "b": 2}), Tool("fly", {})))
        return Outcome(f"{both[0].value} {both[1].error}")

    groups, _ = play(workflow, tools={"add": lambda a, b: a + b})
    assert groups[0].trajectories[0].outcome.answer == "3 no tool named 'fly'; there are: add"


def test_failing_workflow_costs_one_episode():
    def workflow(example, mode):
        yield Generate("s", "r", [1], (), 2)
        if example.id == "q1":
            raise KeyError("no such thing")
        return Outcome("fine")

    groups, _ = play(workflow, examples=3)
    assert [g.trajectories[0].status for g in groups] == [COMPLETED, FAILED, COMPLETED]
    assert groups[1].trajectories[0].error == "KeyError: 'no such thing'"


def test_a_full_stream_ends_the_call_with_limit():
    def workflow(example, mode):
        reply = yield Generate("s", "r", [1] * (SPEC.max_tokens - 3), (), 50)
        again = yield Generate("s", "r", [], (), 5)
        return Outcome(f"{len(reply.tokens)} {reply.stopped_by} {len(again.tokens)} {again.stopped_by}")

    groups, _ = play(workflow)
    assert groups[0].trajectories[0].outcome.answer == "3 limit 0 limit"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Generate("s", "nobody", [1], (), 2), "role 'nobody'"),
        (Generate("s", "r", [1] * 500, (), 2), "rollout.max_tokens is 192"),
        (Generate("s", "r", [1], ("",), 2), "an empty one would stop"),
        (Generate("s", "r", [1], (), 2, sampling=Sampling(top_k=9)), "rollout.num_kept is 8"),
        (Generate("s", "r", [1], (), 2, allowed=Allowed((1, 64))), "allowed ids must lie in 0 ... 63"),
        (Search(("a",), 1), "there is no retriever"),
    ],
)
def test_mistakes_of_a_recipe_are_named(request_, message):
    def workflow(example, mode):
        yield request_
        return Outcome(None)

    with pytest.raises(ValueError, match=message):
        play(workflow)


def test_a_consumer_may_stop_early():
    """What is left behind is dropped, and the next rollout on the same decoder is what it would have been."""

    def workflow(example, mode):
        found = yield Search((example.id,), 1)
        reply = yield Generate("s", "r", document(found.passages[0][0].text) or [1], (), 9)
        return Outcome(reply.text)

    decoder = Decoder(ARCHITECTURE, SPEC, VOCABULARY, END, make_mesh())
    engine = Engine({"m": decoder}, decode, SlowSearcher(0.01), max_episodes=4)
    settings = Play(workflow, {"r": Role("m")}, group_size=2)
    weights = {"m": pack(parameters(), ARCHITECTURE)}
    asked = [Example(f"q{i}", "", ("",)) for i in range(5)]

    def answers(stop: int) -> list:
        groups = []
        for group in engine.run(weights, asked, settings, jax.random.key(0)):
            groups.append([t.outcome.answer for t in group.trajectories])
            if len(groups) == stop:
                break
        return groups

    part = answers(2)
    assert decoder.idle
    assert all(pages.num_held == 0 for pages in decoder.pages)
    assert answers(5)[:2] == part
    engine.close()


def test_every_sampled_token_has_its_numbers():
    for group in roll_out(3, 2):
        for trajectory in group.trajectories:
            for span in (span for stream in trajectory.streams for span in stream.spans if span.act == SAMPLED):
                n = len(span.tokens)
                assert span.logp.shape == span.entropy.shape == span.certainty.shape == span.margin.shape == (n,)
                assert (span.logp <= 1e-6).all() and (span.entropy >= -1e-6).all() and (span.certainty >= -1e-5).all()
                if span.kept is not None:
                    assert (span.kept == span.tokens[:, None]).any(-1).all(), "a token outside the set it came from"
