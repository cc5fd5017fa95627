"""Every implementation of uncertainty against float64: draws, masks, temperatures, ties, and its one read."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from kernels import arg_specs, interpret
from kernels.dispatch import Implementation
from kernels.uncertainty import Filters, api, bisection, blocked, mosaic_gpu, mosaic_tpu, reference, sample
from kernels.uncertainty.reference import first_above, top_two

ROWS, VOCABULARY, PLACES = 9, 7 * 128, 5

# Entries of the table that cut the small logits here into chunks of which the last is shorter, and into tiles of which
# the last overlaps the one before.
CUT = {
    **{
        f"blocked in {num}": Implementation(
            functools.partial(blocked.draw, chunk_bytes=-(-4 * ROWS * VOCABULARY // num))
        )
        for num in (2, 4)
    },
    "mosaic_gpu": Implementation(functools.partial(mosaic_gpu.draw, tile={"lines": 4, "stages": 1})),
    "mosaic_tpu": Implementation(functools.partial(mosaic_tpu.draw, tile={"width": 256})),
}
ACCELERATORS = ("mosaic_gpu", "mosaic_tpu")
REPORT = jax.jit(sample, static_argnames=("implementation", "masked"))


def running(name: str) -> contextlib.AbstractContextManager:
    return interpret.interpreted() if name in ACCELERATORS else contextlib.nullcontext()


@pytest.fixture(params=["blocked", "reference", *CUT])
def report(request, monkeypatch):
    """sample with one implementation, compiled once for all tests."""
    for name, entry in CUT.items():
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, entry)
    with running(request.param):
        yield functools.partial(REPORT, implementation=request.param)


def problem(kind: str, dtype="float32"):
    """logits, uniform, temperature, filters: rows 0 to 3 filtered, 3 and 6 greedy."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(ROWS, VOCABULARY)) * 2
    if kind == "offset":
        logits = np.round(logits * 64) / 64 + 1e4
    elif kind == "peaked":
        logits[:, 700] += 300
    elif kind == "tied":
        logits[:, 3] = logits[:, 640] = logits.max() + 1
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.6] = -np.inf
        logits[:, :300] = -np.inf
        logits[4], logits[4, 890] = -np.inf, 1.0
    temperature = np.array([1, 0.5, 2, 0, 0.7, 1.3, 0, 1, 0.9], np.float32)
    top_k = np.array([3, 0, 4, 0, 0, 0, 0, 0, 0])
    top_p = np.array([1, 0.5, 0.8, 1, 1, 1, 1, 1, 1], np.float32)
    allowed = np.full((ROWS, PLACES), -1)
    allowed[3, :3] = 801, 640, 890
    return jnp.asarray(logits, dtype), rng.random(ROWS, np.float32), temperature, Filters(top_k, top_p, allowed)


def expectation(logits, temperature, sampled, expected_stats):
    """log-prob, entropy, certainty, margin in float64 of the token that was drawn within the set that was kept."""
    scale = 1 / np.where(temperature > 0, temperature, 1).astype(np.float64)
    z = np.asarray(logits, np.float64) * scale[:, None]
    token, kept = np.asarray(sampled.token), np.asarray(sampled.kept)
    stats = expected_stats(z, token[:, None])
    p = np.sort(np.exp(z - stats.lse[:, None]), axis=1)
    log_prob = np.zeros(len(z))
    for row in range(len(z)):
        members = kept[row][kept[row] >= 0] if (kept[row] >= 0).any() else np.arange(z.shape[1])
        assert token[row] in members
        shifted = z[row, members] - z[row].max()
        log_prob[row] = z[row, token[row]] - z[row].max() - np.log(np.exp(shifted).sum())
    return log_prob, stats.entropy, stats.certainty, p[:, -1] - p[:, -2]


def assert_inverse_cdf(logits, uniform, temperature, tokens, tolerance=2e-6):
    """Of unfiltered rows. In float32 a number within rounding of a border may fall to either side."""
    scale = 1 / np.where(temperature > 0, temperature, 1).astype(np.float64)
    z = np.asarray(logits, np.float64) * scale[:, None]
    p = np.exp(z - z.max(-1, keepdims=True))
    cumulative = np.cumsum(p / p.sum(-1, keepdims=True), -1)
    wanted = np.minimum((cumulative <= uniform[:, None]).sum(-1), z.shape[1] - 1)
    wanted = np.where(temperature > 0, wanted, z.argmax(-1))
    border = np.abs(cumulative - uniform[:, None]).min(-1) < tolerance
    assert ((np.asarray(tokens) == wanted) | (border & (temperature > 0))).all()
    assert border.mean() < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "tied", "masked"])
def test_values_equal_float64(report, kind, dtype, expected_stats):
    logits, uniform, temperature, filters = problem(kind, dtype)
    got = report(logits, uniform, temperature, filters)
    expected = expectation(logits, temperature, got, expected_stats)
    # log-prob is a difference of float32 numbers of the size of the logits; the others must not see the offset
    # beyond the rounding of logits * (1 / temperature), 1e-3 at 1e4 and 3e-5 at 400.
    tolerance = {"offset": 8e-3, "peaked": 4e-5}.get(kind, 1e-5)
    for one, other in zip(got[2:], expected):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=tolerance)
    if kind == "tied":
        np.testing.assert_array_equal(got.margin, 0)
    assert (np.asarray(got.kept)[4:] == -1).all()
    if kind != "offset":
        assert_inverse_cdf(logits[4:], uniform[4:], temperature[4:], got.token[4:])


@pytest.mark.parametrize("kind", ["plain", "offset", "peaked", "tied"])
def test_without_masks_the_cheaper_pass_gives_the_same(report, kind):
    arguments = problem(kind)
    # The two are fused differently: a product that is not rounded before the maximum is subtracted (fused multiply-add)
    # differs by the float32 spacing of the logits.
    tolerance = {"offset": 8e-3, "peaked": 4e-5}.get(kind, 1e-5)
    fast, careful = report(*arguments, masked=False), report(*arguments, masked=True)
    same = np.asarray(fast.token) == np.asarray(careful.token)
    assert same.all() or kind == "offset"
    for one, other in zip(fast[2:], careful[2:]):
        np.testing.assert_allclose(np.asarray(one)[same], np.asarray(other)[same], rtol=1e-5, atol=tolerance)


def test_tokens_of_weight_zero_are_never_drawn(report):
    """Also at the ends of the unit interval, exactly between two blocks, and where a block's first are impossible."""
    logits, _, _, filters = problem("masked")
    filters = Filters(np.zeros(ROWS, int), np.ones(ROWS, np.float32), np.asarray(filters.allowed)[:, :0])
    p = np.exp(np.asarray(logits, np.float32))
    borders = np.cumsum(p.reshape(ROWS, -1, 64).sum(-1), -1)
    between = (borders[:, 6] / borders[:, -1]).astype(np.float32)
    for uniform in (np.zeros(ROWS), np.full(ROWS, np.float32(1 - 2**-24)), between, np.nextafter(between, 1)):
        tokens = np.asarray(report(logits, np.float32(uniform), np.ones(ROWS, np.float32), filters).token)
        assert (p[np.arange(ROWS), tokens] > 0).all()


def test_a_row_with_nothing_possible_is_not_nan(report):
    logits, *others = problem("plain")
    got = report(logits.at[5].set(-jnp.inf), *others)
    assert (got.entropy[5], got.certainty[5], got.margin[5]) == (0, 0, 0)
    assert 0 <= int(got.token[5]) < VOCABULARY
    others = np.arange(ROWS) != 5
    assert all(np.isfinite(each[others]).all() for each in got)


@pytest.mark.parametrize("name", ["blocked", "reference"])
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 1000])
def test_vocabularies_of_any_size(name, vocabulary, expected_stats):
    dice = np.random.default_rng(vocabulary)
    logits, uniform = dice.normal(scale=3, size=(600, vocabulary)).astype(np.float32), dice.random(600, np.float32)
    temperature = np.tile(np.float32([1, 0.5, 0]), 200)
    filters = Filters(np.zeros(600, int), np.ones(600, np.float32), np.zeros((600, 0), int))
    entry = CUT["blocked in 4"].run if name == "blocked" else reference.draw
    scale = 1 / np.where(temperature > 0, temperature, 1)
    drawn = jax.jit(entry)(logits, uniform, scale, temperature == 0)
    assert_inverse_cdf(logits, uniform, temperature, drawn.token)
    expected = expected_stats(logits * scale[:, None].astype(np.float64), np.asarray(drawn.token)[:, None])
    for got, wanted in zip(drawn[1:5], (expected.logits[:, 0], *expected[:3])):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)
    if vocabulary > 1:
        np.testing.assert_allclose(drawn.second, np.sort(logits, 1)[:, -2] * scale, rtol=1e-6)
        assert REPORT(logits, uniform, temperature, filters).kept.shape == (600, 0)


def test_draws_are_distributed_as_the_softmax():
    logits = np.random.default_rng(0).normal(scale=1.5, size=200).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(1), (50_000,))
    ones = jnp.ones(50_000)
    drawn = jax.jit(blocked.draw)(jnp.broadcast_to(logits, (50_000, 200)), uniform, ones, ones == 0).token
    p = np.exp(logits.astype(np.float64))
    expected = 50_000 * p / p.sum()
    counts = np.bincount(drawn, minlength=200)
    common = expected > 5
    merged = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert chisquare(*merged).pvalue > 1e-3


@pytest.mark.parametrize("fraction", [-1e-7, 0.0, 0.5, 1.0, 1.5])
def test_rounding_past_an_end_stays_inside(fraction):
    weights = jnp.array([[0.0, 0.0, 2.0, 0.0, 1.0, 0.0]])
    index, before = first_above(weights, jnp.array([fraction]))
    assert int(index[0]) == (2 if fraction <= 0.5 else 4)
    assert float(before[0]) == (0.0 if fraction <= 0.5 else 2.0)
    found = bisection.first_above(weights[0], jnp.arange(6), jnp.float32(3 * fraction), 6, jnp.sum)
    assert int(found) == int(index[0])


@pytest.mark.parametrize("spec", arg_specs.HEADS[::2], ids=lambda spec: spec.name)
def test_proportions_of_real_models(spec, expected_stats):
    spec = spec.scaled(32)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(spec.slots, spec.vocabulary)) * 3, jnp.float32)
    uniform, temperature = rng.random(spec.slots, np.float32), np.full(spec.slots, 0.7, np.float32)
    filters = Filters(np.zeros(spec.slots, int), np.ones(spec.slots, np.float32), np.full((spec.slots, 4), -1))
    got = REPORT(logits, uniform, temperature, filters)
    for one, other in zip(got[2:], expectation(logits, temperature, got, expected_stats)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "platform"), [(mosaic_gpu, "cuda"), (mosaic_tpu, "tpu")], ids=ACCELERATORS)
def test_kernels_lower_for_their_platform_at_real_shapes(kernel, platform):
    for spec, dtype in zip(arg_specs.HEADS[1:], ("float32", "bfloat16")):
        assert kernel.refuses(spec.slots, spec.vocabulary) is None
        row = jax.ShapeDtypeStruct((spec.slots,), jnp.float32)
        logits = jax.ShapeDtypeStruct((spec.slots, spec.vocabulary), dtype)
        traced = jax.jit(functools.partial(kernel.draw, tile=kernel.DEFAULT)).trace(logits, row, row, row)
        assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "128" in kernel.refuses(8, 1000)
    assert kernel.refuses(8, 2**20) is not None


def test_top_two_counts_ties():
    logits = jnp.array([[1.0, 3.0, 2.0], [3.0, 1.0, 3.0], [-jnp.inf, 5.0, -jnp.inf]])
    first, second = top_two(logits)
    np.testing.assert_array_equal(first, [3, 3, 5])
    np.testing.assert_array_equal(second, [2, 3, -np.inf])


def cost(implementation: str, vocabulary: int) -> tuple[float, int]:
    """Bytes accessed and temporary bytes of one call with 64 rows. The body of a loop is counted once."""
    row = jax.ShapeDtypeStruct((64,), jnp.float32)
    filters = Filters(jax.ShapeDtypeStruct((64,), jnp.int32), row, jax.ShapeDtypeStruct((64, 0), jnp.int32))
    arguments = jax.ShapeDtypeStruct((64, vocabulary), jnp.float32), row, row, filters
    compiled = jax.jit(functools.partial(sample, implementation=implementation)).lower(*arguments).compile()
    return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


def test_blocked_reads_the_logits_once():
    """Everything but the read of one chunk happens within a chunk, whose size does not follow the vocabulary."""
    vocabulary = 128 * 1024
    logits_bytes = 4 * 64 * vocabulary
    accessed, temporary = cost("blocked", vocabulary)
    num_chunks = logits_bytes / blocked.CHUNK_BYTES
    assert temporary < 5 * blocked.CHUNK_BYTES
    # Two blocks of 64 entries of every row are looked at again; XLA counts each look as one at the whole operand.
    looks = 3 * logits_bytes
    assert accessed < looks + 20 * logits_bytes / num_chunks  # of one chunk, which stays in cache
    reference_accessed, reference_temporary = cost("reference", vocabulary)
    assert reference_accessed > 8 * logits_bytes
    assert reference_temporary > logits_bytes


def test_wrong_arguments_name_the_values():
    logits, uniform, temperature, filters = problem("plain")
    with pytest.raises(ValueError, match=r"B differs in \(9, 896\), \(7,\)"):
        sample(logits, uniform[:7], temperature, filters)
    with pytest.raises(ValueError, match="there are mosaic_gpu, mosaic_tpu, blocked, reference"):
        sample(logits, uniform, temperature, filters, implementation="fused")
    with interpret.interpreted(), pytest.raises(ValueError, match="multiple of 128, got 100"):
        sample(logits[:, :100], uniform, temperature, filters, implementation="mosaic_gpu")
