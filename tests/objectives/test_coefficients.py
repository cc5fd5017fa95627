import pytest

from rlrag.objectives.coefficients import Coefficient


def test_a_fixed_coefficient_stays():
    assert Coefficient(0.3).following(0.3, {}, 100) == 0.3


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.1, 1.0), (0.2, 1.02), (0.11, 1.01), (0.0, 0.98), (0.095, 0.995), (9.0, 1.02)]
)
def test_a_coefficient_follows_its_target(kl, factor):
    """Ziegler et al. 2019, section 2.2: proportional within 20 %, over the horizon; 100 of 1,000 episodes here."""
    coefficient = Coefficient(0.5, "kl", target=0.1, horizon=1000)
    assert coefficient.following(0.25, {"kl": kl}, 100) == pytest.approx(0.25 * factor)


def test_a_controller_holds_a_divergence_at_its_target():
    """Where the divergence is target / coefficient, the fixed point is the coefficient that gives the target."""
    coefficient, now = Coefficient(0.01, "kl", target=0.05, horizon=256), 0.01
    for _ in range(400):
        now = coefficient.following(now, {"kl": 0.01 / now}, 64)
    assert 0.01 / now == pytest.approx(0.05, rel=0.05)
