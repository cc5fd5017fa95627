"""The monoid: laws, statistics and gradient against float64, under masks, offsets and ids that name nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import token_stats as monoid
from kernels.token_stats import TokenStats

ROWS, VOCABULARY = 6, 37


def logits_of(kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, VOCABULARY)) * 3
    if kind == "offset":
        logits = np.round(logits * 64) / 64 + 1e4  # exact in float32, so that the comparison is of the algebra alone
    elif kind == "peaked":
        logits[:, 5] += 300
    elif kind == "wide":
        logits *= 1e3
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[0, 1:] = -np.inf  # a single candidate
        logits[1] = -np.inf  # nothing at all
    return logits.astype(np.float32)


def ids_of(seed: int = 0, num_wanted: int = 4) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (ROWS, num_wanted))
    ids[2, 1], ids[3, 0] = -1, VOCABULARY
    return ids


PARTIAL, COMBINE = jax.jit(monoid.partial), jax.jit(monoid.combine)

KINDS = ["plain", "offset", "peaked", "wide", "masked"]


@pytest.mark.parametrize(
    ("kind", "masked"), [(kind, masked) for kind in KINDS for masked in (True, False) if masked or kind != "masked"]
)
def test_statistics_equal_float64(kind, masked, expected_stats):
    logits, ids = logits_of(kind), ids_of()
    got = jax.jit(lambda z, i: monoid.finish(monoid.partial(z, i, masked=masked)))(logits, ids)
    expected = expected_stats(logits, ids)
    # The offset must not leak into entropy and certainty: 1e-5 nats at logits of 1e4, whose float32 spacing is 1e-3.
    np.testing.assert_allclose(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.certainty, expected.certainty, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.lse, expected.lse, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got.logits, np.float64), expected.logits)


def test_negative_infinity_without_mask_has_probability_zero():
    got = monoid.finish(monoid.partial(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[0]]), masked=False))
    assert got.lse[0] == pytest.approx(np.log(2))
    assert got.entropy[0] == pytest.approx(np.log(2))
    assert got.certainty[0] == np.inf


def split(logits, ids, cuts) -> list[monoid.TokenSums]:
    edges = [0, *cuts, VOCABULARY]
    return [monoid.partial(logits[:, a:b], ids, start=a) for a, b in itertools.pairwise(edges)]


def assert_same(left, right, tolerance=2e-5):
    for name, one, other in zip(left._fields, left, right):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
    owners=st.lists(st.integers(0, 3), min_size=VOCABULARY, max_size=VOCABULARY),
    order=st.permutations(range(4)),
)
def test_subsets_in_any_order_make_the_whole(kind, seed, owners, order):
    logits, ids = jnp.asarray(logits_of(kind, seed)), jnp.asarray(ids_of(seed))
    subsets = [jnp.where(np.equal(owners, owner), logits, -jnp.inf) for owner in order]
    parts = [PARTIAL(subset, ids) for subset in subsets]
    whole, merged = PARTIAL(logits, ids), functools.reduce(COMBINE, parts)
    assert_same(merged, whole)
    assert_same(monoid.finish(merged), monoid.finish(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_a_commutative_monoid(kind):
    logits, ids = jnp.asarray(logits_of(kind)), jnp.asarray(ids_of())
    one, two, three = split(logits, ids, (7, 20))
    combine = monoid.combine
    assert_same(combine(combine(one, two), three), combine(one, combine(two, three)))
    assert_same(combine(one, two), combine(two, one), tolerance=0)
    empty = monoid.empty((ROWS,), ids.shape[-1])
    assert_same(combine(one, empty), one, tolerance=0)
    assert_same(combine(empty, one), one, tolerance=0)
    assert_same(combine(empty, empty), empty, tolerance=0)


def cotangent_of(num_wanted: int = 4) -> TokenStats:
    rng = np.random.default_rng(7)
    return TokenStats(*rng.normal(size=(3, ROWS)), rng.normal(size=(ROWS, num_wanted)))


def finite_differences(logits, ids, cotangent, expected_stats) -> np.ndarray:
    """Central differences of sum(cotangent * stats) in float64; 0 where the logit is -inf."""
    logits = np.asarray(logits, np.float64)
    names_a_logit = (ids >= 0) & (ids < VOCABULARY)
    gradient, step = np.zeros_like(logits), 1e-5

    def objective(z):
        stats = expected_stats(z, ids)
        wanted = np.where(names_a_logit & (stats.logits > -np.inf), stats.logits, 0)
        lse = np.where(stats.lse > -np.inf, stats.lse, 0)
        dense = cotangent.lse * lse + cotangent.entropy * stats.entropy + cotangent.certainty * stats.certainty
        return dense + (cotangent.logits * wanted).sum(-1)

    for column in range(VOCABULARY):
        moved = np.zeros_like(logits)
        moved[:, column] = step
        difference = (objective(logits + moved) - objective(logits - moved)) / (2 * step)
        gradient[:, column] = np.where(logits[:, column] > -np.inf, difference, 0)
    return gradient


def test_combine_along_an_axis_is_combine():
    logits, ids = logits_of("offset"), ids_of()
    parts = split(logits, ids, (5, 20))
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *parts)
    assert_same(monoid.combine_along(stacked), functools.reduce(monoid.combine, parts))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_finished_parts_can_be_merged(kind):
    logits, ids = logits_of(kind), ids_of()
    edges = [0, 5, 20, VOCABULARY]
    sizes = [end - start for start, end in itertools.pairwise(edges)]
    parts = [monoid.finish(part) for part in split(logits, ids, (5, 20))]
    again = [monoid.sums_of(part, size) for part, size in zip(parts, sizes)]
    whole = monoid.finish(monoid.partial(logits, ids))
    assert_same(monoid.finish(functools.reduce(monoid.combine, again)), whole, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "masked"])
def test_gradient_equals_finite_differences(kind, expected_stats):
    logits, ids, cotangent = logits_of(kind), ids_of(), cotangent_of()
    stats = monoid.finish(monoid.partial(logits, ids))
    got = jax.jit(monoid.gradient)(logits, ids, stats.lse, stats.entropy, cotangent)
    # At an offset of 1e4, lse is known to 5e-4 only.
    tolerance = 5e-3 if kind == "offset" else 2e-5
    expected = finite_differences(logits, ids, cotangent, expected_stats)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_gradient_of_a_block_is_that_block_of_the_gradient(kind):
    logits, ids, cotangent = logits_of(kind), ids_of(), cotangent_of()
    sums = monoid.partial(logits, ids)
    stats = monoid.finish(sums)
    count = jnp.maximum(sums.count, 1)
    whole = monoid.gradient(logits, ids, stats.lse, stats.entropy, cotangent)
    block = functools.partial(monoid.gradient, lse=stats.lse, entropy=stats.entropy, cotangent=cotangent, count=count)
    blocks = [block(logits[:, :11], ids), block(logits[:, 11:], ids, start=11)]
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), whole, rtol=1e-6, atol=1e-7)


def test_inverse_temperature_of_zero_is_one():
    np.testing.assert_array_equal(monoid.inverse_temperature(jnp.array([0.0, 0.5, 2.0])), [1, 2, 0.5])
    gradient = jax.grad(lambda t: monoid.inverse_temperature(t).sum())(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(gradient, [0, -4])


def test_filtered_log_prob_renormalises_and_mixes_rows():
    kept = jnp.array([[1.0, 2.0, -jnp.inf], [-jnp.inf, -jnp.inf, -jnp.inf]])
    token, lse = jnp.array([2.0, 2.0]), jnp.array([5.0, 5.0])
    got = monoid.filtered_log_prob(token, lse, kept)
    np.testing.assert_allclose(got, [2 - np.log(np.exp(1) + np.exp(2)), -3], rtol=1e-6)
    np.testing.assert_array_equal(monoid.filtered_log_prob(token, lse, kept[:, :0]), [-3, -3])


def test_filtered_log_prob_gradient_reaches_only_what_is_used():
    kept = jnp.array([[1.0, 2.0, -jnp.inf], [-jnp.inf, -jnp.inf, -jnp.inf]])
    arguments = (jnp.array([2.0, 2.0]), jnp.array([5.0, 5.0]), kept)
    token, lse, places = jax.grad(lambda *a: monoid.filtered_log_prob(*a).sum(), (0, 1, 2))(*arguments)
    p = np.exp([1, 2]) / np.exp([1, 2]).sum()
    np.testing.assert_allclose(token, [1, 1])
    np.testing.assert_allclose(lse, [0, -1])
    np.testing.assert_allclose(places, [[-p[0], -p[1], 0], [0, 0, 0]], rtol=1e-6)
