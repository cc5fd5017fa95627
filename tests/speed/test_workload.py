"""Episodes are functions of their names, and what playing them takes is counted token by token."""

import numpy as np
import pytest

from rlrag.agents.workflow import Generate, Reply, Search
from rlrag.speed.workload import Workload, volume
from rlrag.trajectory import SAMPLED, Span

UNEVEN = Workload(64, prompt_tokens=5, turns=(1, 4), turn_tokens=(4, 128), document_tokens=(2, 9), skewed=True)


def test_episodes_of_one_name_are_equal_and_samples_share_the_prompt():
    assert UNEVEN.episode("a") == UNEVEN.episode("a") != UNEVEN.episode("b")
    first, second = UNEVEN.episode("a", 0), UNEVEN.episode("a", 1)
    assert first[0].append == second[0].append
    assert first != second


def test_sizes_lie_in_their_ranges_and_skewed_turns_are_mostly_short():
    episodes = [UNEVEN.episode(str(n)) for n in range(400)]
    lengths = [turn.length for turns in episodes for turn in turns]
    assert {len(turns) for turns in episodes} == {1, 2, 3, 4}
    assert min(lengths) >= 4 and max(lengths) <= 128
    # Evenly in the logarithm: the mean of [4, 129) is 125 / log(129 / 4), the median the geometric mean.
    assert np.mean(lengths) == pytest.approx(36, rel=0.1)
    assert np.median(lengths) == pytest.approx(22, rel=0.15)
    assert all(2 <= len(turn.append) <= 9 for turns in episodes for turn in turns[1:])
    assert max(sum(len(t.append) + t.length for t in turns) for turns in episodes) <= UNEVEN.capacity
    assert all(0 < token < 63 for turns in episodes for turn in turns for token in turn.append)


def test_the_workflow_plays_the_episode():
    (example,) = UNEVEN.examples(1)
    play, played, request = UNEVEN.play(example, "train"), [], None
    reply = Reply(np.zeros(0, np.int32), "", "limit", Span("agent", SAMPLED, np.zeros(0, np.int32)))
    try:
        request = next(play)
        while True:
            if isinstance(request, Generate):
                played.append((list(request.append), request.limit))
            else:
                assert isinstance(request, Search)
            request = play.send(reply)
    except StopIteration:
        pass
    assert played == [(list(turn.append), turn.length) for turn in UNEVEN.episode(example.id)]


def test_volume_counts_what_each_token_sees():
    episodes = [UNEVEN.episode(str(n)) for n in range(5)]
    sampled = sampled_context = read = read_context = 0
    for turns in episodes:
        length = cached = 0
        for turn in turns:
            length += len(turn.append)
            while cached < length - 1:
                cached += 1
                read, read_context = read + 1, read_context + cached
            for _ in range(turn.length):
                cached += 1  # the newest goes in, and sees itself
                sampled, sampled_context = sampled + 1, sampled_context + cached
                length += 1
    assert volume(episodes) == (sampled, sampled_context, read, read_context)


def test_groups_nobody_played_have_what_an_update_reads():
    (group, _) = UNEVEN.groups(2, 3)
    assert [t.sample for t in group.trajectories] == [0, 1, 2]
    for trajectory in group.trajectories:
        (stream,) = trajectory.streams
        turns = UNEVEN.episode(group.example.id, trajectory.sample)
        assert stream.num_tokens == sum(len(turn.append) + turn.length for turn in turns)
        assert all(len(span.logp) == len(span.tokens) for span in stream.spans if span.act == SAMPLED)
