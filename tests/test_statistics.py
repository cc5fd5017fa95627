import numpy as np
import pytest
from scipy import stats

from rlrag.statistics import t_interval, two_level_bootstrap


def test_t_interval_is_scipys():
    values = [0.1, 0.4, 0.25, 0.3, 0.05]
    wanted = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(wanted)


def test_t_interval_by_hand():
    """Three differences 1, 2, 3: mean 2, s 1, t(2, .975) 4.303."""
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_one_value_has_no_interval():
    assert np.isnan(t_interval([0.3])).all()


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """Seeds differ, questions differ: an interval that forgot either would be too short. Percentile bootstraps over 8
    seeds are known to be somewhat short of 95 %."""
    dice, truth, hits = np.random.default_rng(0), 0.1, 0
    for trial in range(120):
        seeds, questions = dice.normal(0, 0.1, (8, 1)), dice.normal(0, 0.3, (1, 40))
        a = truth + seeds + questions + dice.normal(0, 0.2, (8, 40))
        low, high = two_level_bootstrap(a, np.zeros((8, 40)), resamples=300, seed=trial)
        hits += low <= truth <= high
    assert 0.84 <= hits / 120 <= 0.99


def test_the_bootstrap_of_a_constant_difference_is_that():
    b = np.random.default_rng(0).random((5, 7))
    assert two_level_bootstrap(b + 0.25, b, resamples=50) == pytest.approx((0.25, 0.25))


def test_the_bootstrap_draws_seeds_whole():
    """Questions all alike: what is left is the spread of the seeds' means under resampling."""
    a = np.repeat(np.array([[0.0], [0.0], [0.0], [0.0], [1.0]]), 9, axis=1)
    low, high = two_level_bootstrap(a, np.zeros_like(a))
    draws = stats.binom(5, 0.2)
    assert (low, high) == pytest.approx((draws.ppf(0.025) / 5, draws.ppf(0.975) / 5))


@pytest.mark.parametrize(
    ("shapes", "told"), [(((3, 9), (3, 9)), "a bootstrap over 3 seeds"), (((5, 9), (5, 8)), r"\[seeds, questions\]")]
)
def test_what_cannot_be_compared_is_told(shapes, told):
    with pytest.raises(ValueError, match=told):
        two_level_bootstrap(*(np.zeros(shape) for shape in shapes))
