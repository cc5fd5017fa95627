import numpy as np
import pytest

from rlrag.rewards.length import overlong_reward
from rlrag.trajectory import OBSERVED, Example, Group, Span, Stream, Trajectory


def episode(*lengths):
    streams = []
    for number, length in enumerate(lengths):
        streams.append(Stream(f"s{number}", "agent"))
        streams[-1].add(Span("agent", OBSERVED, np.zeros(length, np.int32)))
    return Trajectory(Example("q", "", ("a",)), streams=streams)


@pytest.mark.parametrize(
    ("lengths", "amount"),
    [((80,), 0.0), ((84,), 0.0), ((85,), -1 / 16), ((92,), -0.5), ((100,), -1.0), ((9, 92), -0.5)],
)
def test_what_too_long_an_episode_loses(lengths, amount):
    """DAPO's equation 13 with a longest of 100 tokens and a cache of 16."""
    trajectory = episode(*lengths)
    (paid,) = overlong_reward(100, 16)(Group(trajectory.example, [trajectory]))
    assert paid.per_call == {"overlong": [pytest.approx(amount)] * len(lengths)}
    assert paid.metrics["overlong"] == pytest.approx(amount)


@pytest.mark.parametrize("over", [0, 100])
def test_a_window_that_cannot_be_is_told(over):
    with pytest.raises(ValueError, match=f"reward.overlong_tokens is {over}: give at least 1 and less than"):
        overlong_reward(100, over)
