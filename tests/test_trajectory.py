import dataclasses

import numpy as np
import pytest

from rlrag.trajectory import (
    COMPLETED,
    FORCED,
    OBSERVED,
    SAMPLED,
    Example,
    Outcome,
    SearchRecord,
    Span,
    Stream,
    Trajectory,
)


def span(act, *tokens):
    return Span("agent", act, np.array(tokens, np.int32))


def test_a_stream_is_its_spans_in_order():
    stream = Stream("agent", "agent")
    assert (stream.tokens.dtype, len(stream.tokens), len(stream.act)) == (np.int32, 0, 0)
    for part in (span(OBSERVED, 5, 6), span(SAMPLED, 7), span(FORCED, 8, 9), span(SAMPLED)):
        stream.add(part)
    assert stream.num_tokens == 5
    np.testing.assert_array_equal(stream.tokens, [5, 6, 7, 8, 9])
    np.testing.assert_array_equal(stream.act, [OBSERVED, OBSERVED, SAMPLED, FORCED, FORCED])


def test_only_sampled_tokens_count_as_sampled():
    streams = [Stream("a", "agent"), Stream("b", "agent")]
    streams[0].add(span(OBSERVED, 1, 2))
    streams[0].add(span(SAMPLED, 3, 4, 5))
    streams[1].add(span(FORCED, 6))
    streams[1].add(span(SAMPLED, 7))
    trajectory = Trajectory(Example("q", "who?", ("x",)), streams=streams)
    assert trajectory.num_sampled == 4


def test_every_query_of_a_search_is_a_search():
    records = [SearchRecord(("a", "b"), [[], []]), SearchRecord(("c",), [[]], error="deadline")]
    assert Trajectory(Example("q", "who?", ("x",)), searches=records).num_searches == 3


def test_an_episode_that_did_nothing():
    trajectory = Trajectory(Example("q", "who?", ("x",)))
    assert (trajectory.status, trajectory.outcome, trajectory.num_sampled) == (COMPLETED, Outcome(None), 0)
    other = Trajectory(trajectory.example)
    trajectory.streams.append(Stream("agent", "agent"))
    assert other.streams == [], "episodes share nothing"


def test_examples_are_values():
    assert Example("q", "who?", ("x",)) == Example("q", "who?", ("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example("q", "who?", ("x",)).question = "other"  # type: ignore[misc]
