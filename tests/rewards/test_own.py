import pytest

from rlrag.rewards.own import own_reward
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Example, Group, Outcome, Stream, Trajectory

EXAMPLE = Example("q7", "?", ("yes",))


def group(*answers):
    return Group(EXAMPLE, [Trajectory(EXAMPLE, streams=[Stream("a", "a")], outcome=Outcome(text)) for text in answers])


def test_a_number_is_paid_to_every_stream():
    paid = own_reward(lambda answer, example: answer == example.answers[0])(group("yes", "no"))
    assert [p.per_call for p in paid] == [{"reward": [1.0]}, {"reward": [0.0]}]


def test_named_parts_are_added_and_shown():
    (paid,) = own_reward(lambda answer, example, weight=0.5: {"right": 1, "short": weight})(group("yes"))
    assert paid.per_call == {"reward": [1.5]}
    assert paid.metrics == {"right": 1.0, "short": 0.5}


def test_a_function_of_the_group_says_all_itself():
    rank = lambda g: [Paid({"rank": [float(n)]}) for n, _ in enumerate(g.trajectories)]  # noqa: E731
    assert [p.per_call for p in own_reward(rank)(group("a", "b"))] == [{"rank": [0.0]}, {"rank": [1.0]}]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda answer, example: 1 / 0, r"failed on example 'q7' \(ZeroDivisionError"),
        (lambda answer, example: float("nan"), "of example 'q7' is nan: give a finite number"),
        (lambda answer, example: "high", r"failed on example 'q7' \(ValueError"),
        (lambda group: [], "must give one Paid for each of the 1 episodes of 'q7', it gave 0"),
        (lambda group: [1.0], r"it gave 1 of \['float'\]"),
        (lambda group: 1 / 0, "failed on example 'q7'"),
    ],
)
def test_a_wrong_reward_is_never_0(function, told):
    with pytest.raises(ValueError, match=told):
        own_reward(function)(group("yes"))


def test_a_function_of_another_form_is_told():
    with pytest.raises(ValueError, match=r"takes 3 arguments: write reward\(answer, example\) -> float"):
        own_reward(lambda a, b, c: 0.0)
