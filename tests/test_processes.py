"""Two processes train as one does; one of them killed, both begin again and end as if nothing had been."""

import pytest

from rlrag import processes
from rlrag.collection import Collected, regrouped, together
from rlrag.train import train
from tests.pod import ALONE_S, CLOSE, Setting, apart, kill_one, on_policy, run_apart


@pytest.fixture
def as_one_of(monkeypatch):
    """Stand in for a process among several."""

    def one_of(count, index=0):
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "index", lambda: index)

    return one_of


@pytest.mark.parametrize("items", [range(10), range(2), []])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_shares_in_order_are_the_whole(as_one_of, items, count):
    shares = []
    for index in range(count):
        as_one_of(count, index)
        shares.append(processes.share(items))
    assert [item for share in shares for item in share] == list(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not items or shares[0], "the first writes"


def test_alone_a_process_hears_itself():
    value = {"any": object}
    assert processes.gather("topic", value) == [value]
    assert processes.is_first()
    with processes.first_alone():
        pass


def test_episodes_made_ahead_are_dealt_out_anew_where_the_number_of_processes_changed(as_one_of):
    usage = {"tokens": 10.0, "tokens_per_s": 6.0, "device_s": 2.0, "lane_occupancy": 0.5}
    parts = [Collected(3, 2, list(range(i, i + 2)), [[i]] * 2, [True, False], "cursor", usage) for i in (0, 2, 4)]
    as_one_of(3, 1)
    assert regrouped(parts) is parts[1]
    as_one_of(2, 1)
    found = regrouped(parts)
    assert (found.groups, found.accept, found.cursor) == ([3, 4, 5], [False, True, False], "cursor")
    assert found.usage == {"tokens": 15.0, "tokens_per_s": 9.0, "device_s": 2.0, "lane_occupancy": 0.5}


def test_rollouts_side_by_side_add_their_tokens():
    one = {"tokens": 10.0, "tokens_per_s": 5.0, "device_s": 2.0, "lane_occupancy": 0.5}
    two = {"tokens": 30.0, "tokens_per_s": 10.0, "device_s": 4.0, "lane_occupancy": 1.0}
    assert together([one, two]) == {"tokens": 40.0, "tokens_per_s": 15.0, "device_s": 3.0, "lane_occupancy": 0.875}
    assert together([one]) == one
    idle = {"tokens": 0.0, "lane_occupancy": 0.0}
    assert together([idle, two])["lane_occupancy"] == pytest.approx(1.0), "one had nothing to play"


def test_two_processes_are_one_and_survive_each_other(tmp_path):
    """On a mesh of data 2 x model 2 over two processes, of which one is killed: the pair, started again, ends as one
    device does that was left alone (`make pod` has more: pairs left alone, and that each ends bit by bit as those)."""
    pair, alone, killed = Setting(2, 2, model=2), tmp_path / "alone", tmp_path / "killed"
    train(on_policy(), alone)
    # The first holds JAX's service: the other learns at once, where it would wait for a heartbeat otherwise.
    seconds, told = kill_one("on_policy", killed, pair, victim=0, row=6)
    assert seconds <= ALONE_S
    assert told.startswith("error: process 1 of 2")
    assert "another process of this training is gone" in told
    for compiled in run_apart("on_policy", killed, pair):
        # Of the two stages, each of which has an update of its own, the last was left.
        assert compiled["advance"] == compiled["prepare"] == compiled["accumulate"] == compiled["apply"] == 1
    worst, number = apart(killed, alone)
    assert worst <= CLOSE
    assert number > 80
