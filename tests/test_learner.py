import numpy as np
import pytest

from rlrag.collection import Collected
from rlrag.learner import describe, minibatches
from rlrag.packing import Shape, pack
from rlrag.rewards.paid import Paid
from rlrag.trajectory import COMPLETED, OBSERVED, SAMPLED, SEARCH_FAILED, Example, Group, Span, Stream, Trajectory

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
    values = describe(Collected(3, 2, groups, paid, [True, True], None, {}), packed)
    assert values["staleness"] == 1.0
    assert values["reward"] == values["em"] == pytest.approx(0.5)
    assert values["trained_tokens"] == 4, "an episode whose search failed is not learned from"
    assert values["left_out"] == 1
    assert values["status/completed"] == pytest.approx(2 / 3)
    assert values["status/search_failed"] == pytest.approx(1 / 3)
    assert values["searches"] == 0.0
