import pytest

from rlrag.config import Watch
from rlrag.watch import Watchman


def alarms(watchman, values, steps, first=1):
    return [(a.step, a.metric) for step in range(first, first + steps) for a in watchman.look(step, values)]


@pytest.mark.parametrize(
    ("metric", "fine", "bad", "told"),
    [
        (
            "sampler_learner_gap",
            0.01,
            0.2,
            "step 3: sampler_learner_gap is 0.2 for 3 steps, above 0.05 (watch.max_gap)",
        ),
        ("legal", 0.9, 0.1, "step 3: legal is 0.1 for 3 steps, below 0.5 (watch.min_legal)"),
        ("grad_norm", 1.0, float("nan"), "step 3: grad_norm is nan for 3 steps, above 100 (watch.max_grad_norm)"),
        ("truncated", 0.1, 1.0, "step 3: truncated is 1 for 3 steps, above 0.5 (watch.max_truncated)"),
    ],
)
def test_a_bound_crossed_for_long_enough_is_told_once(metric, fine, bad, told):
    watchman = Watchman(Watch(patience=3))
    assert [a.text for step in (1, 2, 3) for a in watchman.look(step, {metric: bad})] == [told]
    assert alarms(watchman, {metric: bad}, 9, first=4) == []
    assert alarms(watchman, {metric: fine}, 1, first=13) == []
    assert alarms(watchman, {metric: bad}, 3, first=14) == [(16, metric)]


def test_a_streak_is_broken_by_a_good_step():
    watchman = Watchman(Watch(patience=2))
    for step, value in enumerate([0.99, 0.1, 0.99, 0.1, 0.99]):
        assert watchman.look(step, {"truncated": value}) == []


def test_no_bound_no_alarm():
    off = Watch(1, 0, 0, 0, 0, 0, 0, 0, 0)
    values = {"sampler_learner_gap": 9.0, "entropy": 0.0, "truncated": 1.0, "reward": 0.0}
    assert alarms(Watchman(off), values, 20) == []


def test_a_reward_that_falls_is_told():
    watchman = Watchman(Watch(patience=2))
    assert alarms(watchman, {"reward": 0.8}, 20) == []
    found = alarms(watchman, {"reward": 0.0}, 20, first=21)
    # 0.8 * 0.8^n < 0.4 from n = 4 on; the second such step is 25.
    assert found == [(25, "reward")]


def test_a_skipped_update_is_told_at_once():
    (alarm,) = Watchman(Watch()).look(7, {"skipped": 1.0})
    assert alarm.text == "step 7: 1 update(s) skipped, their gradient was not finite"


def test_a_restored_watch_goes_on():
    first, second = Watchman(Watch(patience=3)), Watchman(Watch(patience=3))
    alarms(first, {"truncated": 1.0, "reward": 1.0}, 2)
    second.state = first.state
    assert alarms(second, {"truncated": 1.0, "reward": 1.0}, 1, first=3) == [(3, "truncated")]
