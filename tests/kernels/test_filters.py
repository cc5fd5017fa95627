"""Filtered sets against the logits processors of transformers in NumPy, and the draw within them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from kernels.uncertainty import Filters
from kernels.uncertainty import sample as report
from kernels.uncertainty.filters import keep, largest

K = 8


def controls(temperature, top_k, top_p, allowed=None) -> tuple:
    B = len(temperature)
    rows = np.full((B, K), -1, np.int32)
    for row, ids in enumerate(allowed or [()] * B):
        rows[row, : len(ids)] = ids
    return np.float32(temperature), Filters(np.int32(top_k), np.float32(top_p), rows)


def sample(logits, uniform, c):
    """The token and the kept set."""
    return report(logits, uniform, *c, masked=False)[:2]


@pytest.mark.parametrize(("vocabulary", "number"), [(4096, 32), (4096, 1), (1000, 8), (70, 8), (6, 8), (2048, 300)])
def test_two_levels_find_what_one_finds(vocabulary, number):
    """Ids too, where many logits are equal."""
    dice = np.random.default_rng(vocabulary)
    for logits in (dice.normal(size=(20, vocabulary)), dice.integers(0, 6, (20, vocabulary))):
        values, ids = jax.jit(largest, static_argnums=1)(jnp.float32(logits), number)
        wanted_values, wanted_ids = jax.lax.top_k(jnp.float32(logits), min(number, vocabulary))
        np.testing.assert_array_equal(values[:, :vocabulary], wanted_values)
        np.testing.assert_array_equal(ids[:, :vocabulary], wanted_ids)
        assert (np.asarray(ids)[:, vocabulary:] == -1).all()


def transformers_filter(logits, temperature, top_k, top_p, allowed) -> np.ndarray:
    """Scores after PrefixConstrained-, Temperature-, TopK- and TopPLogitsProcessor, in float64; -inf = filtered."""
    scores = logits.astype(np.float64)
    if len(allowed):
        scores = np.where(np.isin(np.arange(len(scores)), allowed), scores, -np.inf)
    scores = scores / (temperature or 1.0)
    if top_k:
        scores = np.where(scores < np.sort(scores)[-min(top_k, len(scores))], -np.inf, scores)
    if top_p < 1:
        order = np.argsort(scores, kind="stable")
        p = np.exp(scores[order] - scores.max())
        remove = np.cumsum(p / p.sum()) <= 1 - top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    return scores


def test_filters_are_those_of_transformers():
    dice = np.random.default_rng(2)
    B, V = 600, 70
    logits = dice.normal(scale=2.5, size=(B, V)).astype(np.float32)
    temperature = dice.choice([0.0, 0.5, 1.0, 1.7], B)
    top_k = dice.choice([0, 1, 3, K], B)
    top_p = dice.choice([0.05, 0.4, 0.9, 1.0], B)
    allowed = [dice.permutation(V)[: dice.integers(0, K + 1)] if dice.random() < 0.5 else () for _ in range(B)]
    scale = np.float32(1 / np.where(temperature > 0, temperature, 1))
    lse = np.logaddexp.reduce(logits * scale[:, None], -1)
    filters = controls(temperature, top_k, top_p, allowed)[1]
    ids, values = map(np.asarray, jax.jit(keep)(logits, scale, lse, filters))
    whole = 0
    for row in range(B):
        scores = transformers_filter(logits[row], temperature[row], top_k[row], top_p[row], allowed[row])
        wanted = set(np.flatnonzero(scores > -np.inf).tolist())
        kept = [i for i in ids[row].tolist() if i >= 0]
        assert len(set(kept)) == len(kept)
        if len(wanted) > K:  # nothing but top_p filters, and its set is larger than the capacity: cut to the best K
            best = sorted(wanted, key=lambda i: -scores[i])[:K]
            assert set(kept) == set(best)
            whole += 1
            continue
        assert set(kept) == wanted
        np.testing.assert_allclose(values[row][ids[row] >= 0], scores[kept], rtol=1e-6)
        assert (np.diff(values[row][ids[row] >= 0]) <= 0).all(), "best first"
    assert 0 < whole < B / 2


def test_samples_lie_in_their_set_and_follow_its_distribution():
    dice = np.random.default_rng(3)
    logits = np.broadcast_to(dice.normal(size=40).astype(np.float32), (20_000, 40))
    c = controls(np.full(20_000, 0.8), np.full(20_000, 6), np.full(20_000, 0.9))
    tokens, kept = map(np.asarray, jax.jit(sample)(logits, dice.random(20_000, np.float32), c))
    scores = transformers_filter(logits[0], 0.8, 6, 0.9, ())
    inside = np.flatnonzero(scores > -np.inf)
    assert set(tokens.tolist()) == set(inside.tolist())
    assert (kept == kept[0]).all()
    assert set(kept[0][kept[0] >= 0].tolist()) == set(inside.tolist())
    p = np.exp(scores[inside])
    assert chisquare(np.bincount(tokens, minlength=40)[inside], 20_000 * p / p.sum()).pvalue > 1e-3


def test_greedy_takes_the_best_of_what_is_allowed():
    dice = np.random.default_rng(4)
    logits = dice.normal(size=(50, 30)).astype(np.float32)
    uniform = dice.random(50, np.float32)
    tokens, kept = jax.jit(sample)(logits, uniform, controls(np.zeros(50), np.zeros(50), np.ones(50)))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert (kept == -1).all()
    allowed = [dice.permutation(30)[:5] for _ in range(50)]
    tokens, kept = jax.jit(sample)(logits, uniform, controls(np.zeros(50), np.zeros(50), np.ones(50), allowed))
    assert tokens.tolist() == [int(ids[logits[row, ids].argmax()]) for row, ids in enumerate(allowed)]
    assert [set(row) for row in kept[:, :5].tolist()] == [set(ids.tolist()) for ids in allowed]


def test_a_row_does_not_depend_on_the_others():
    """Neither on their filters nor on their number, to the last bit."""
    dice = np.random.default_rng(5)
    logits, uniform = dice.normal(size=(12, 90)).astype(np.float32), dice.random(12, np.float32)
    c = controls(
        np.tile([1.0, 0.0, 0.7], 4), np.repeat([0, 3], 6), np.tile([1.0, 1.0, 0.5, 1.0], 3),
        [()] * 8 + [(4, 9, 2)] * 2 + [()] * 2,
    )  # fmt: skip
    together = jax.jit(sample)(logits, uniform, c)
    one = jax.jit(sample)
    for row in range(12):
        at = slice(row, row + 1)
        alone = one(logits[at], uniform[at], jax.tree.map(lambda x: x[at], c))  # noqa: B023
        assert int(alone[0][0]) == int(together[0][row])
        np.testing.assert_array_equal(alone[1][0], together[1][row])


def test_without_capacity_nothing_is_kept():
    c = jnp.ones(2), Filters(jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros((2, 0), jnp.int32))
    tokens, kept = jax.jit(sample)(jnp.zeros((2, 9)), jnp.array([0.0, 0.99]), c)
    assert tokens.tolist() == [0, 8]
    assert kept.shape == (2, 0)


def test_everything_filtered_but_one():
    c = controls([1.0, 1.0, 1.0], [1, 0, 0], [1.0, 1e-6, 1.0], [(), (), (7,)])
    logits = np.random.default_rng(6).normal(size=(3, 20)).astype(np.float32)
    for uniform in (0.0, 0.999999):
        tokens, _ = jax.jit(sample)(logits, np.full(3, uniform, np.float32), c)
        assert tokens.tolist() == [int(logits[0].argmax()), int(logits[1].argmax()), 7]
