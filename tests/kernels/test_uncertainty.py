"""Every implementation of uncertainty against float64: kept sets, masks, temperatures, ties, and its one read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import arg_specs
from kernels.dispatch import Implementation
from kernels.uncertainty import api, blocked, uncertainty
from kernels.uncertainty.reference import top_two

ROWS, VOCABULARY, PLACES = 8, 61, 5


# Entries of the table that cut the small logits here into two and eight unequal blocks.
CUT = {
    f"blocked in {num}": Implementation(
        functools.partial(blocked.statistics, block_bytes=-(-4 * ROWS * VOCABULARY // num))
    )
    for num in (2, 8)
}
REPORT = jax.jit(uncertainty, static_argnames=("implementation", "masked"))


@pytest.fixture(params=[*api.IMPLEMENTATIONS, *CUT])
def report(request, monkeypatch):
    """uncertainty with one implementation, compiled once for all tests."""
    for name, entry in CUT.items():
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, entry)
    return functools.partial(REPORT, implementation=request.param)


def problem(kind: str, dtype="float32"):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(ROWS, VOCABULARY)) * 3
    if kind == "offset":
        logits = np.round(logits * 64) / 64 + 1e4
    elif kind == "peaked":
        logits[:, 7] += 300
    elif kind == "tied":
        logits[:, 3] = logits[:, 40] = logits.max() + 1
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.6] = -np.inf
        logits[0], logits[0, 9] = -np.inf, 1.0
    logits = jnp.asarray(logits, dtype)
    # Sampled from what is possible; rows 0 to 3 filtered to 1 to 4 tokens, the others not.
    possible = [np.flatnonzero(row > -np.inf) for row in np.asarray(logits, np.float64)]
    sampled = np.array([rng.choice(each) for each in possible])
    kept = np.full((ROWS, PLACES), -1)
    for row in range(4):
        others = rng.permutation(np.setdiff1d(possible[row], sampled[row]))[:row]
        members = np.append(others, sampled[row])
        kept[row][rng.permutation(PLACES)[: len(members)]] = members
    temperature = np.array([1, 0.5, 2, 0, 0.7, 1.3, 0, 1], np.float32)
    return logits, sampled, temperature, kept


def expectation(logits, sampled, temperature, kept, expected_stats):
    """log-prob, entropy, certainty, margin in float64."""
    scale = 1 / np.where(temperature > 0, temperature, 1).astype(np.float64)
    z = np.asarray(logits, np.float64) * scale[:, None]
    stats = expected_stats(z, sampled[:, None])
    p = np.sort(np.exp(z - stats.lse[:, None]), axis=1)
    log_prob = np.zeros(len(z))
    for row, token in enumerate(sampled):
        members = kept[row][kept[row] >= 0] if (kept[row] >= 0).any() else np.arange(z.shape[1])
        shifted = z[row, members] - z[row].max()
        log_prob[row] = z[row, token] - z[row].max() - np.log(np.exp(shifted).sum())
    return log_prob, stats.entropy, stats.certainty, p[:, -1] - p[:, -2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "tied", "masked"])
def test_values_equal_float64(report, kind, dtype, expected_stats):
    arguments = problem(kind, dtype)
    expected = expectation(*arguments, expected_stats)
    log_prob, *others = report(*arguments)
    # log-prob is a difference of float32 numbers of the size of the logits; the others must not see the offset
    # beyond the rounding of logits * (1 / temperature), 1e-3 at 1e4.
    np.testing.assert_allclose(log_prob, expected[0], rtol=1e-5, atol=4e-3 if kind == "offset" else 1e-5)
    for got, wanted in zip(others, expected[1:]):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=4e-3 if kind == "offset" else 1e-5)
    if kind == "tied":
        np.testing.assert_array_equal(others[2], 0)


@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "tied"])
def test_without_masks_the_cheaper_pass_gives_the_same(report, kind):
    arguments = problem(kind)
    # The two are fused differently: a product that is not rounded before the maximum is subtracted (fused multiply-add)
    # differs by the float32 spacing of the logits.
    tolerance = 4e-3 if kind == "offset" else 1e-5
    for fast, careful in zip(report(*arguments, masked=False), report(*arguments, masked=True)):
        np.testing.assert_allclose(fast, careful, rtol=1e-5, atol=tolerance)


def test_no_kept_places_is_unfiltered(report):
    logits, sampled, temperature, kept = problem("plain")
    unfiltered = report(logits, sampled, temperature, np.full_like(kept, -1))
    for one, other in zip(report(logits, sampled, temperature, kept[:, :0]), unfiltered):
        np.testing.assert_array_equal(one, other)


def test_a_row_with_nothing_possible_is_not_nan(report):
    logits, sampled, temperature, kept = problem("plain")
    got = report(logits.at[5].set(-jnp.inf), sampled, temperature, kept)
    assert (got.entropy[5], got.certainty[5], got.margin[5]) == (0, 0, 0)
    others = np.arange(ROWS) != 5
    assert all(np.isfinite(each[others]).all() for each in got)


@pytest.mark.parametrize("spec", arg_specs.HEADS[::2], ids=lambda spec: spec.name)
def test_proportions_of_real_models(spec, expected_stats):
    spec = spec.scaled(32)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(spec.slots, spec.vocabulary)) * 3, jnp.float32)
    sampled, kept = rng.integers(0, spec.vocabulary, spec.slots), np.full((spec.slots, 0), -1)
    arguments = (logits, sampled, np.full(spec.slots, 0.7, np.float32), kept)
    for got, wanted in zip(REPORT(*arguments), expectation(*arguments, expected_stats)):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)


def test_top_two_counts_ties():
    first, second = top_two(jnp.array([[1.0, 3.0, 3.0], [1.0, 3.0, 2.0], [5.0, -jnp.inf, -jnp.inf]]))
    np.testing.assert_array_equal(first, [3, 3, 5])
    np.testing.assert_array_equal(second, [3, 2, -np.inf])


def cost(implementation: str, vocabulary: int) -> tuple[float, int]:
    """Bytes accessed and temporary bytes of one call with 64 rows. The body of a loop is counted once."""
    shapes = [((64, vocabulary), jnp.float32), ((64,), jnp.int32), ((64,), jnp.float32), ((64, 4), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*each) for each in shapes]
    compiled = jax.jit(functools.partial(uncertainty, implementation=implementation)).lower(*arguments).compile()
    return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


def test_blocked_reads_the_logits_once():
    """Everything but the read of one block happens within a block, whose size does not follow the vocabulary."""
    vocabulary = 128 * 1024
    logits_bytes = 4 * 64 * vocabulary
    accessed, temporary = cost("blocked", vocabulary)
    num_blocks = logits_bytes / blocked.BLOCK_BYTES
    assert temporary < 5 * blocked.BLOCK_BYTES
    assert accessed < 20 * logits_bytes / num_blocks  # of one block, which stays in cache
    reference_accessed, reference_temporary = cost("reference", vocabulary)
    assert reference_accessed > 10 * logits_bytes
    assert reference_temporary > logits_bytes


def test_wrong_arguments_name_the_values():
    logits, sampled, temperature, kept = problem("plain")
    with pytest.raises(ValueError, match=r"\(8, 61\), \(7,\) and \(8, 5\)"):
        uncertainty(logits, sampled[:7], temperature, kept)
    with pytest.raises(ValueError, match="there are blocked, reference"):
        uncertainty(logits, sampled, temperature, kept, implementation="fused")
