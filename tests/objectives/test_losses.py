"""Losses as formulas on arrays: identities, masks, clipping, the KL estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.metrics import numbers
from rlrag.objectives.losses import (
    Scores,
    aggregated,
    importance_weights,
    joined,
    kl_estimate,
    nll,
    segment_mean,
    surrogate,
    value,
    watched,
)
from tests.episodes import make_groups, pack_groups


@pytest.fixture(scope="module")
def micro():
    """One micro-batch, with weights and log-probs for every token."""
    batch = jax.tree.map(lambda leaf: jnp.array(leaf[0]), pack_groups(make_groups(4), rows=6).batch)
    dice = np.random.default_rng(0)
    draw = lambda scale: jnp.array(scale * dice.normal(size=batch.act.shape), jnp.float32)  # noqa: E731
    trained = batch.trained
    return batch.replace(
        weight=draw(1.0) * trained,
        old_logp=-1 + draw(0.3),
        ref_logp=-1 + draw(0.5),
        logp=-1 + draw(0.3),
        value=draw(0.5),
        target=draw(0.5),
    )


@pytest.fixture(scope="module")
def scores(micro) -> Scores:
    dice = np.random.default_rng(1)
    logp, entropy, certainty = (jnp.array(dice.normal(size=micro.act.shape), jnp.float32) for _ in range(3))
    return Scores(-1 + 0.3 * logp, entropy, certainty, 0.5 * certainty)


def loss(objective, scores: Scores, batch) -> jax.Array:
    return sum(term.value() for term in objective.terms(scores, batch).losses.values())


def gradient(objective, scores: Scores, batch) -> np.ndarray:
    return np.asarray(jax.grad(lambda logp: loss(objective, scores._replace(logp=logp), batch))(scores.logp))


OBJECTIVES = {
    "nll": nll(),
    "surrogate": surrogate(),
    "kl": surrogate(0.1, 0.3, kl="k3", entropy=True),
    "gspo": surrogate(3e-1, 4e-1, ratio="sequence", aggregate="sequence"),
    "dr_grpo": surrogate(aggregate="constant", constant_tokens=50, dual_clip=3.0),
    "importance": surrogate(importance="token"),
    "sequence importance": surrogate(importance="sequence"),
    "joined": joined(surrogate(), value()),
}


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
    fields = (
        "logp", "old_logp", "ref_logp", "weight", "entropy", "certainty", "bonus", "temperature", "value", "target",
    )  # fmt: skip
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
    objective = surrogate(kl="k3")
    trained = np.asarray(micro.act) > 0
    d = np.asarray(micro.ref_logp, np.float64) - np.asarray(scores.logp, np.float64)
    k3 = np.exp(d) - d - 1
    terms = objective.terms(scores, micro)
    assert (k3 >= 0).all()
    assert float(terms.metrics["kl"].value()) == pytest.approx(k3[trained].mean(), rel=1e-5)
    assert float(terms.losses["kl"].value()) == pytest.approx(k3[trained].mean(), rel=1e-5)
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
    other = Scores(*(values + 1 for values in scores))
    for objective in OBJECTIVES.values():
        first, second = (objective.terms(s, micro).losses for s in (scores, other))
        assert {name: float(term.count) for name, term in first.items()} == {
            name: float(term.count) for name, term in second.items()
        }


def test_tokens_count_alike_sequences_count_alike_or_by_a_constant(micro):
    values = jnp.array(np.random.default_rng(5).normal(size=micro.act.shape), jnp.float32)
    by_sequence = sequences(micro)
    sums = np.array([np.asarray(values, np.float64)[where].sum() for where in by_sequence])
    lengths = np.array([where.sum() for where in by_sequence])
    assert len(set(lengths)) > 2
    means = {
        "token": sums.sum() / lengths.sum(),
        "sequence": (sums / lengths).mean(),
        "constant": (sums / 50).mean(),
    }
    for name, expected in means.items():
        assert float(aggregated(values, micro, name, 50).value()) == pytest.approx(expected, rel=1e-4)


def sequences(micro) -> list[np.ndarray]:
    """For every segment with something to learn, where [R, T] its trained tokens are."""
    segment, act = np.asarray(micro.segment), np.asarray(micro.act)
    rows = np.arange(len(act))[:, None]
    masks = [(rows == row) & (segment == s) & (act > 0) for row in range(len(act)) for s in range(1, segment.max() + 1)]
    return [mask for mask in masks if mask.any()]


def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(micro, scores):
    """GSPO, equation 7; the same objective written out sequence by sequence."""
    batch = micro.replace(weight=jnp.where(micro.trained > 0, segment_mean(micro.weight, micro), 0.0))
    low, high, total = 0.05, 0.1, []
    for where in sequences(batch):
        log_ratio = (np.asarray(scores.logp, np.float64) - np.asarray(batch.old_logp, np.float64))[where]
        ratio = np.prod(np.exp(log_ratio)) ** (1 / len(log_ratio))
        advantage = np.asarray(batch.weight)[where][0]
        total.append(-min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage))
    objective = surrogate(low, high, ratio="sequence", aggregate="sequence")
    assert float(loss(objective, scores, batch)) == pytest.approx(np.mean(total), rel=1e-4)
    fraction = float(objective.terms(scores, batch).metrics["clip_fraction"].value())
    assert 0.1 < fraction < 1.0


def test_dual_clip_bounds_what_a_bad_token_can_cost(micro, scores):
    """max(min(r A, clip(r) A), c A) where A < 0 (Ye et al. 2020, equation 5)."""
    bound = 1.3
    ratio = np.exp(np.asarray(scores.logp, np.float64) - np.asarray(micro.old_logp, np.float64))
    A, trained = np.asarray(micro.weight, np.float64), np.asarray(micro.act) > 0
    plain = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
    value = np.where(A < 0, np.maximum(plain, bound * A), plain)
    assert (value != plain)[trained].any()
    objective = surrogate(dual_clip=bound)
    assert float(loss(objective, scores, micro)) == pytest.approx(-value[trained].mean(), rel=1e-5)
    stuck = trained & (A < 0) & (ratio > bound)
    assert stuck.any()
    assert (gradient(objective, scores, micro)[stuck] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_of_the_divergence(estimator):
    """Exact sums over a small vocabulary: k1 and k3 have KL(p || q) as their mean; as losses at the sampling policy k2
    has its gradient, k1 has none, k3 has that of KL(q || p)."""
    dice = np.random.default_rng(0)
    logits, q = jnp.array(dice.normal(size=6)), dice.dirichlet(np.ones(6))
    p = np.asarray(jax.nn.softmax(logits), np.float64)

    def expected(logits):  # the sample's probability is not differentiated: it was drawn before
        return jnp.sum(p * kl_estimate(jax.nn.log_softmax(logits) - np.log(q), estimator))

    divergence = lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - np.log(q)))  # noqa: E731
    reverse = lambda z: -jnp.sum(q * jax.nn.log_softmax(z))  # noqa: E731
    if estimator != "k2":
        assert float(expected(logits)) == pytest.approx(float(divergence(logits)), rel=1e-5)
    slope = {"k1": np.zeros(6), "k2": jax.grad(divergence)(logits), "k3": jax.grad(reverse)(logits)}[estimator]
    np.testing.assert_allclose(jax.grad(expected)(logits), slope, atol=1e-6)


def test_an_entropy_bonus_is_the_negative_entropy(micro, scores):
    trained = np.asarray(micro.act) > 0
    term = surrogate(entropy=True).terms(scores, micro).losses["entropy"]
    assert float(term.value()) == pytest.approx(-np.asarray(scores.entropy)[trained].mean(), rel=1e-5)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_importance_weights_are_truncated_and_have_no_gradient(micro, scores, importance):
    cap, sampled = 1.1, np.asarray(micro.act) == 1
    log_weight = np.where(sampled, np.asarray(micro.old_logp, np.float64) - np.asarray(micro.logp, np.float64), 0.0)
    expected = np.ones(sampled.shape)
    for where in sequences(micro):
        inside = np.exp(log_weight[where].sum()) if importance == "sequence" else np.exp(log_weight[where])
        expected[where] = np.minimum(inside, cap)
    trained = np.asarray(micro.act) > 0
    assert (expected[trained] == cap).any()
    assert (expected[trained] < cap).any()
    found = importance_weights(micro, importance, cap)
    np.testing.assert_allclose(np.asarray(found)[trained], expected[trained], rtol=1e-4)
    objective = surrogate(importance=importance, importance_cap=cap)
    scaled = micro.replace(weight=micro.weight * jnp.where(micro.trained > 0, found, 0.0))
    np.testing.assert_allclose(gradient(objective, scores, micro), gradient(surrogate(), scores, scaled), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_critic_is_pulled_to_its_target_and_not_far_from_where_it_was(micro, scores, clip):
    v, old, target = (np.asarray(x, np.float64) for x in (scores.value, micro.value, micro.target))
    trained = np.asarray(micro.act) > 0
    error = (v - target) ** 2
    if clip:
        error = np.maximum(error, (np.clip(v, old - clip, old + clip) - target) ** 2)
    found = value(clip).terms(scores, micro).losses["value"]
    assert float(found.value()) == pytest.approx(0.5 * error[trained].mean(), rel=1e-5)


def test_accepted_tokens_alone_are_the_mean_of_rejection_sampling(micro, scores):
    batch = micro.replace(weight=(micro.weight > 0) * micro.trained)
    chosen = (np.asarray(micro.weight) > 0) & (np.asarray(micro.act) > 0)
    expected = -np.asarray(scores.logp)[chosen].mean()
    assert float(loss(nll(weighted_mean=True), scores, batch)) == pytest.approx(expected, rel=1e-5)


def test_what_is_watched_by_turn_and_role(micro, scores):
    rewards = micro.segments.rewards.at[:, ::2].add(-9.0)
    segments = micro.segments.replace(rewards=rewards)
    batch = micro.replace(role=micro.turn % 2, turn=micro.turn + 6, segments=segments)
    metrics = watched(scores, batch, num_roles=2)
    trained, sampled = np.asarray(batch.act) > 0, np.asarray(batch.act) == 1
    role, turn = np.asarray(batch.role), np.minimum(np.asarray(batch.turn), 7)
    gap = np.abs(np.asarray(scores.logp) - np.asarray(batch.logp))
    values = numbers(jax.device_get(metrics), {"role": ["a", "b"], "turn": list(map(str, range(8)))})
    for number, name in enumerate("ab"):
        expected = np.asarray(scores.entropy)[trained & (role == number)].mean()
        assert values[f"entropy/{name}"] == pytest.approx(expected, rel=1e-4)
    for number in (6, 7):
        where = sampled & (turn == number)
        assert values[f"sampler_learner_gap/{number}"] == pytest.approx(gap[where].mean(), rel=1e-4)
    assert "sampler_learner_gap/0" not in values
    rewards = np.where(np.asarray(batch.segments.valid), np.asarray(batch.segments.rewards), 0).sum(-1)
    earned = np.take_along_axis(rewards > 0, np.asarray(batch.segment), -1) & trained
    assert earned.any()
    assert (trained & ~earned).any()
    assert values["correct_logp"] == pytest.approx(np.asarray(scores.logp)[earned].mean(), rel=1e-4)


@pytest.mark.parametrize("options", [{"clip_low": 1.1}, {"clip_low": -0.1}, {"clip_high": -0.1}])
def test_bounds_that_cannot_work_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}.* {value}.*: give 0 <= clip_low <= 1"):
        surrogate(**options)
