"""Losses as formulas on arrays: identities, masks, clipping, the KL estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.objectives.losses import Scores, nll, surrogate
from tests.episodes import make_groups, pack_groups


@pytest.fixture(scope="module")
def micro():
    """One micro-batch, with weights and log-probs for every token."""
    batch = jax.tree.map(lambda leaf: jnp.array(leaf[0]), pack_groups(make_groups(4), rows=6).batch)
    dice = np.random.default_rng(0)
    draw = lambda scale: jnp.array(scale * dice.normal(size=batch.act.shape), jnp.float32)  # noqa: E731
    trained = batch.trained
    return batch.replace(
        weight=draw(1.0) * trained, old_logp=-1 + draw(0.3), ref_logp=-1 + draw(0.5), logp=-1 + draw(0.3)
    )


@pytest.fixture(scope="module")
def scores(micro) -> Scores:
    dice = np.random.default_rng(1)
    logp, entropy, certainty = (jnp.array(dice.normal(size=micro.act.shape), jnp.float32) for _ in range(3))
    return Scores(-1 + 0.3 * logp, entropy, certainty)


def loss(objective, scores: Scores, batch) -> jax.Array:
    return sum(term.value() for term in objective.terms(scores, batch).losses.values())


def gradient(objective, scores: Scores, batch) -> np.ndarray:
    return np.asarray(jax.grad(lambda logp: loss(objective, scores._replace(logp=logp), batch))(scores.logp))


OBJECTIVES = {"nll": nll(), "surrogate": surrogate(), "kl": surrogate(0.1, 0.3, kl=0.7)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_observed_tokens_have_gradient_zero(micro, scores, name):
    values = gradient(OBJECTIVES[name], scores, micro)
    assert (values[np.asarray(micro.act) == 0] == 0).all()
    assert (values[np.asarray(micro.act) > 0] != 0).mean() > 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_written_at_observed_tokens_matters(micro, scores, name):
    """nan in every number an observed token carries changes no bit of loss, gradient and metrics."""
    hidden = micro.act == 0
    plant = lambda x: jnp.where(hidden, jnp.nan, x)  # noqa: E731
    fields = ("logp", "old_logp", "ref_logp", "weight", "entropy", "certainty", "bonus", "temperature")
    dirty = micro.replace(**{field: plant(getattr(micro, field)) for field in fields})
    dirty_scores = Scores(*map(plant, scores))
    objective = OBJECTIVES[name]
    np.testing.assert_array_equal(gradient(objective, dirty_scores, dirty), gradient(objective, scores, micro))
    clean, other = (objective.terms(*pair) for pair in ((scores, micro), (dirty_scores, dirty)))
    jax.tree.map(np.testing.assert_array_equal, tuple(clean), tuple(other))


def test_nll_is_a_weighted_mean_over_trained_tokens(micro, scores):
    trained = np.asarray(micro.act) > 0
    expected = -(np.asarray(scores.logp) * np.asarray(micro.weight))[trained].mean()
    assert float(loss(nll(), scores, micro)) == pytest.approx(expected, rel=1e-5)


def test_surrogate_at_ratio_one_is_the_policy_gradient(micro, scores):
    """d/dlogp [ratio A] = A where ratio = 1 (the score-function estimator), clipped nowhere."""
    batch = micro.replace(old_logp=scores.logp)
    values = gradient(surrogate(), scores, batch)
    count = float(batch.trained.sum())
    np.testing.assert_allclose(values, -np.asarray(batch.weight) / count, rtol=1e-6)
    terms = surrogate().terms(scores, batch)
    assert float(terms.metrics["clip_fraction"].total) == 0.0
    assert float(terms.metrics["ratio"].value()) == float(terms.metrics["ratio_max"].value()) == 1.0
    np.testing.assert_allclose(values, gradient(nll(), scores, batch), rtol=1e-6)


def test_clipping_as_in_the_paper(micro, scores):
    """min(r A, clip(r) A): no gradient where the ratio has already moved past its bound in the direction of A."""
    low, high = 0.1, 0.25
    ratio = np.exp(np.asarray(scores.logp, np.float64) - np.asarray(micro.old_logp, np.float64))
    A, trained = np.asarray(micro.weight), np.asarray(micro.act) > 0
    value = np.minimum(ratio * A, np.clip(ratio, 1 - low, 1 + high) * A)
    objective = surrogate(low, high)
    assert float(loss(objective, scores, micro)) == pytest.approx(-value[trained].mean(), rel=1e-5)
    stuck = ((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low))
    values = gradient(objective, scores, micro)
    assert stuck[trained].any()
    assert (values[trained & stuck] == 0).all()
    free = trained & ~stuck
    np.testing.assert_allclose(values[free], (-ratio * A / trained.sum())[free], rtol=1e-4)
    outside = (ratio > 1 + high) | (ratio < 1 - low)
    assert float(objective.terms(scores, micro).metrics["clip_fraction"].value()) == pytest.approx(
        outside[trained].mean()
    )


def test_k3_is_never_negative_and_zero_at_equality(micro, scores):
    objective = surrogate(kl=0.5)
    trained = np.asarray(micro.act) > 0
    d = np.asarray(micro.ref_logp, np.float64) - np.asarray(scores.logp, np.float64)
    k3 = np.exp(d) - d - 1
    terms = objective.terms(scores, micro)
    assert (k3 >= 0).all()
    assert float(terms.metrics["kl"].value()) == pytest.approx(k3[trained].mean(), rel=1e-5)
    assert float(terms.losses["kl"].value()) == pytest.approx(0.5 * k3[trained].mean(), rel=1e-5)
    same = micro.replace(ref_logp=scores.logp)
    assert float(objective.terms(scores, same).losses["kl"].total) == 0.0
    np.testing.assert_array_equal(gradient(objective, scores, same), gradient(surrogate(), scores, same))


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """The mean of k3 over samples of the policy is KL(policy || reference)."""
    dice = np.random.default_rng(0)
    p, q = dice.dirichlet(np.ones(6), 2)
    d = np.log(q) - np.log(p)
    assert (p * (np.exp(d) - d - 1)).sum() == pytest.approx((p * np.log(p / q)).sum())


def test_the_gap_counts_sampled_tokens_only(micro, scores):
    terms = surrogate().terms(scores, micro)
    sampled = np.asarray(micro.act) == 1
    gap = np.abs(np.asarray(scores.logp) - np.asarray(micro.logp))[sampled]
    assert (np.asarray(micro.act) == 2).any()
    assert float(terms.metrics["sampler_learner_gap"].value()) == pytest.approx(gap.mean(), rel=1e-5)
    assert float(terms.metrics["sampler_learner_gap_max"].value()) == pytest.approx(gap.max(), rel=1e-6)


def test_counts_do_not_depend_on_scores(micro, scores):
    for objective in OBJECTIVES.values():
        for term in objective.terms(scores, micro).losses.values():
            assert float(term.count) == float(micro.trained.sum())


@pytest.mark.parametrize("options", [{"clip_low": 1.0}, {"clip_low": -0.1}, {"clip_high": -0.1}, {"kl": -1.0}])
def test_coefficients_that_cannot_work_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}.* {value}.*: give 0 <= clip_low < 1"):
        surrogate(**options)
