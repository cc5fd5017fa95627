"""The host side of one model: slots, pages and calls, without workflows."""

import dataclasses

import jax
import numpy as np
import pytest

from rlrag.agents.workflow import Allowed, Sampling
from rlrag.mesh import make_mesh
from rlrag.model.decoding import pack
from rlrag.rollout.advance import ENDED, LIMITED, STOPPED, Spec
from rlrag.rollout.decoder import CachedStream, Call, Decoder, check
from tests.rollout.rehearsal import ARCHITECTURE, END, SPEC, VOCABULARY, decode, parameters

TIGHT = dataclasses.replace(SPEC, num_slots=3, num_pages=26, max_tokens=96, prefill_rows=2)
HOT = Sampling(temperature=1.3)
PROMPTS = [np.random.default_rng(i).integers(0, 20, 5 + 3 * i).tolist() for i in range(8)]


def build(spec: Spec) -> Decoder:
    return Decoder(ARCHITECTURE, spec, VOCABULARY, END, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def weights():
    return pack(parameters(), ARCHITECTURE)


@pytest.fixture(scope="module")
def roomy() -> Decoder:
    return build(SPEC)


@pytest.fixture(scope="module")
def tight() -> Decoder:
    return build(TIGHT)


def run(decoder: Decoder) -> list[tuple[CachedStream, Call]]:
    finished = []
    while decoder.launch():
        finished += decoder.collect()
    assert decoder.idle
    return finished


def converse(decoder: Decoder, weights, turns: int = 3, limit: int = 7) -> list[list[int]]:
    """Every prompt in a stream of its own, `turns` calls each with tokens appended between; the streams' tokens."""
    decoder.start(weights, jax.random.key(0))
    streams = [decoder.open(uid, 0) for uid in range(len(PROMPTS))]
    for turn in range(turns):
        for number, (stream, prompt) in enumerate(zip(streams, PROMPTS)):
            stream.append(prompt if turn == 0 else [turn, number])
            assert decoder.submit(stream, (turn, number), (), limit, HOT, None)
        finished = run(decoder)
        assert sorted(call.ticket for _, call in finished) == [(turn, number) for number in range(len(PROMPTS))]
    tokens = [stream.tokens[: stream.length].tolist() for stream in streams]
    for stream in streams:
        decoder.close(stream)
    assert [pages.num_held for pages in decoder.pages] == [0]
    return tokens


def test_taking_pages_away_changes_no_token(roomy, tight, weights):
    before = dataclasses.replace(roomy.usage), dataclasses.replace(tight.usage)
    expected = converse(roomy, weights)
    assert converse(tight, weights) == expected
    usage, cramped = roomy.usage - before[0], tight.usage - before[1]
    assert usage.evictions == 0
    assert cramped.evictions > 0
    assert cramped.prefill_tokens > usage.prefill_tokens, "what was taken away is computed again"
    assert cramped.shared_tokens > 0, "but not what nobody has written over yet"
    emitted = 3 * 7 * len(PROMPTS)
    for each, spec in ((usage, SPEC), (cramped, TIGHT)):
        assert each.live_lane_steps >= emitted - 3 * len(PROMPTS) * 6  # END may come early
        assert each.lane_steps == each.decode_steps * spec.num_slots
        assert each.live_lane_steps + each.wasted_lane_steps <= each.lane_steps
    assert usage.live_lane_steps == sum(map(len, expected)) - sum(map(len, PROMPTS)) - 2 * 2 * len(PROMPTS)
    assert roomy.advance._cache_size() == tight.advance._cache_size() == 1


def test_every_call_ends_for_a_reason(roomy, weights):
    roomy.start(weights, jax.random.key(1))
    streams = [roomy.open(uid, 0) for uid in range(3)]
    for stream in streams:
        stream.append([1, 2, 3])
    assert roomy.submit(streams[0], "limit", (), 4, HOT, None)
    assert roomy.submit(streams[1], "stop", ("b",), 60, HOT, Allowed((0, 1, 2)))
    assert roomy.submit(streams[2], "end", (), 60, HOT, Allowed((0, END)))
    ended = {call.ticket: (call, stream) for stream, call in run(roomy)}
    assert {ticket: call.reason for ticket, (call, _) in ended.items()} == {
        "limit": LIMITED, "stop": STOPPED, "end": ENDED
    }  # fmt: skip
    tokens, logp, entropy, certainty, margin, kept = ended["stop"][0].emitted()
    assert decode(tokens.tolist()).count("b") == 1
    assert decode(tokens.tolist()).endswith("b")
    assert roomy.stops.found(ended["stop"][0].stop_state) == "b"
    assert len(tokens) == len(logp) == len(entropy) == len(certainty) == len(margin) == len(kept)
    assert ended["end"][0].emitted()[0].tolist()[-1] == END
    for stream in streams:
        roomy.close(stream)


def test_nothing_can_be_emitted(roomy, weights):
    roomy.start(weights, jax.random.key(1))
    stream = roomy.open(0, 0)
    stream.append([1] * SPEC.max_tokens)
    assert not roomy.submit(stream, None, (), 5, HOT, None), "the stream is full"
    other = roomy.open(1, 0)
    other.append([1] * (SPEC.max_tokens - 2))
    assert not roomy.submit(other, None, (), 0, HOT, None)
    assert roomy.idle
    assert not roomy.launch()
    assert roomy.submit(other, None, (), 5, HOT, Allowed((3,)))
    ((_, call),) = run(roomy)
    assert call.emitted()[0].tolist() == [3, 3], "the stream's end is a limit too"
    roomy.close(stream)
    roomy.close(other)


def test_pages_are_found_again_under_the_same_weights_only(roomy, weights):
    def play() -> tuple[int, int]:
        before = dataclasses.replace(roomy.usage)
        stream = roomy.open(0, 0)
        stream.append(list(range(21)))
        assert roomy.submit(stream, None, (), 2, HOT, None)
        run(roomy)
        roomy.close(stream)
        used = roomy.usage - before
        return used.prefill_tokens, used.shared_tokens

    roomy.start(weights, jax.random.key(0))
    assert play() == (20, 0)
    assert play() == (0, 20), "a closed stream's pages are still there"
    roomy.start(weights, jax.random.key(0))
    assert play() == (20, 0)


def test_an_abandoned_rollout_leaves_the_decoder_usable(roomy, weights):
    expected = converse(roomy, weights)
    roomy.start(weights, jax.random.key(0))
    streams = [roomy.open(uid, 0) for uid in range(12)]
    for stream in streams:
        stream.append([5] * 40)
        roomy.submit(stream, None, (), 50, HOT, None)
    roomy.launch()
    assert not roomy.idle
    with pytest.raises(AssertionError, match="a rollout is still running"):
        roomy.start(weights, jax.random.key(0))
    roomy.abandon()
    assert roomy.idle
    for stream in streams:
        roomy.close(stream)
    assert roomy.pages[0].num_held == 0
    assert converse(roomy, weights) == expected


@pytest.mark.parametrize(
    ("sampling", "allowed", "message"),
    [
        (Sampling(top_k=9), None, r"filtered set of 9 ids \(top_k 9.*num_kept is 8: raise it"),
        (HOT, Allowed(tuple(range(10))), r"filtered set of 10 ids.*10 allowed\), rollout\.num_kept is 8"),
        (HOT, Allowed((3, 64)), r"allowed ids must lie in 0 \.\.\. 63, got \(3, 64\)"),
        (HOT, Allowed((-1,)), r"allowed ids must lie in 0 \.\.\. 63"),
        (HOT, Allowed(()), r"allowed ids must lie in 0 \.\.\. 63, got \(\)"),
    ],
)
def test_calls_that_cannot_be_served_are_refused(roomy, weights, sampling, allowed, message):
    roomy.start(weights, jax.random.key(0))
    stream = roomy.open(0, 0)
    stream.append([1])
    with pytest.raises(ValueError, match=message):
        roomy.submit(stream, None, (), 5, sampling, allowed)
    roomy.close(stream)


def test_streams_that_are_too_long_are_refused(roomy, weights):
    stream = roomy.open(0, 0)
    with pytest.raises(ValueError, match=r"would hold 193 tokens, rollout\.max_tokens is 192: raise it"):
        stream.append([1] * 193)
    roomy.close(stream)


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({"num_slots": 6}, 4, r"rollout\.num_slots is 6: make it a multiple of the 4 data shard"),
        ({"prefill_rows": 0}, 1, r"rollout\.prefill_rows is 0"),
        ({"page_size": 5}, 1, r"max_tokens 192 is not a multiple of page_size 5"),
        (
            {"num_pages": 47},
            1,
            r"num_pages is 47 over 1 shard.*max_tokens 192 needs 48 pages on its shard: raise num_pages",
        ),
    ],
)
def test_sizes_that_cannot_work_are_named(changes, shards, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(SPEC, **changes), shards)


def test_struck_ids_are_counted_once(roomy, weights):
    """An id that is listed twice may still be emitted only once: the call ends with the set."""
    roomy.start(weights, jax.random.key(0))
    stream = roomy.open(0, 0)
    stream.append([1])
    assert roomy.submit(stream, None, (), 9, HOT, Allowed((5, 5, 7, 7), once=True))
    ((_, call),) = run(roomy)
    assert sorted(call.emitted()[0].tolist()) == [5, 7]
    roomy.close(stream)
