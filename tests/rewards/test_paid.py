"""Rewards added up: names apart, factors applied, metrics kept."""

import numpy as np

from rlrag.rewards.paid import Paid, combined
from rlrag.trajectory import Example, Group, Trajectory


def test_combined():
    def answer(group):
        return [Paid({"answer": [1.0, 0.5]}, {"s": np.array([2.0])}, {"em": 1.0}) for _ in group.trajectories]

    def form(group):
        return [Paid({"format": [1.0, np.nan]}, {}, {"legal": 0.25}) for _ in group.trajectories]

    group = Group(Example("q", "", ("a",)), [Trajectory(Example("q", "", ("a",)))] * 2)
    paid = combined((answer, 1.0), (form, 0.2))(group)
    assert len(paid) == 2
    assert paid[0].per_call["answer"] == [1.0, 0.5]
    assert paid[0].per_call["format"][0] == 0.2
    assert np.isnan(paid[0].per_call["format"][1])
    assert paid[0].metrics == {"em": 1.0, "legal": 0.25}
    np.testing.assert_array_equal(paid[0].per_token["s"], [2.0])
