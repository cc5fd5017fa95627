"""Everything asked for is played, by one program, and the floor counts what was read and sampled."""

import pytest

from rlrag.speed import rollout
from rlrag.speed.floor import decoding, prefilling
from rlrag.speed.searching import SlowSearcher
from rlrag.speed.workload import Workload, volume
from tests.speed.tiny import ARCHITECTURE, SETTING, Rates


@pytest.fixture(scope="module")
def player():
    return rollout.Player(ARCHITECTURE, SETTING.sizes, 64)


@pytest.fixture(scope="module")
def weights():
    return rollout.packed(ARCHITECTURE, rollout.start(ARCHITECTURE))


def test_a_talk_is_played_to_its_lengths(player, weights):
    played = player.play(weights, SETTING.talk, 6, searcher=SlowSearcher(0.01), seed=3, keep=True)
    episodes = [SETTING.talk.episode(example.id) for example in SETTING.talk.examples(6, 3)]
    needed = volume(episodes)
    report = played.report(Rates)
    assert report["sampled_tokens"] == needed.sampled
    assert report["decode_flops"] == decoding(ARCHITECTURE, needed, 4).flops
    assert report["prefill_tokens"] == needed.read
    assert report["prefill_flops"] == prefilling(ARCHITECTURE, needed.read, needed.read_context, 32).flops
    assert report["search_wait_s"] >= 0.01
    assert 0 < report["slot_occupancy"] <= 1
    assert report["share_of_floor"] == pytest.approx(report["floor_s"] / report["seconds"])
    assert [group.example.id for group in played.groups] == [example.id for example in SETTING.talk.examples(6, 3)]
    for group, turns in zip(played.groups, episodes):
        (stream,) = group.trajectories[0].streams
        assert stream.num_tokens == sum(len(turn.append) + turn.length for turn in turns)


def test_groups_share_their_prompt_and_its_floor(player, weights):
    workload = Workload(ARCHITECTURE.vocab_size, prompt_tokens=33, turn_tokens=(4, 4))
    alone = player.play(weights, workload, 8)
    together = player.play(weights, workload, 8, group_size=8)
    assert alone.usage["shared_tokens"] == 0
    assert together.usage["shared_tokens"] == 7 * 32  # whole pages of 4
    assert together.usage["prefill_tokens"] == 32
    assert together.prefilling.flops == pytest.approx(alone.prefilling.flops / 8)
    assert together.decoding == alone.decoding
    assert player.programs == 1


def test_what_is_shared_sees_the_least():
    needed = volume([Workload(64, prompt_tokens=9).episode("a")])
    assert rollout.read(needed, 4, 1) == (4, 5 + 6 + 7 + 8)
    assert rollout.read(needed, 0, 1) == (8, 36)
