"""Every implementation of log_prob against float64, values and gradients, its memory, and its sharding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import arg_specs
from kernels.log_prob import api, log_prob, naive, token_stats
from kernels.log_prob.chunked import chunk_length
from kernels.log_prob.vocabulary_parallel import Shards

# (implementation, chunk_tokens): no chunks, one chunk, three with padding, all of T, one column a chunk.
WAYS = [("reference", None), ("chunked", None), ("chunked", 10), ("chunked", 26), ("chunked", 1)]
KERNELS = {"mosaic_gpu", "mosaic_tpu"}  # test_log_prob_kernels.py
ROWS, TOKENS, WANTED = 2, 13, 3


def test_every_implementation_is_tested():
    assert {name for name, _ in WAYS} | KERNELS == set(api.IMPLEMENTATIONS)


class Problem:
    """Inputs, cotangents and the float64 answer of one call."""

    def __init__(
        self, expected_stats, hidden_dim=16, vocabulary=53, spread=1.0, dtype="float32", temperature=True, tokens=TOKENS
    ):
        rng = np.random.default_rng(3)
        shape = (ROWS, tokens)
        head = rng.normal(size=(vocabulary, hidden_dim)) * spread
        self.hidden, self.head = (jnp.asarray(x, dtype) for x in (rng.normal(size=(*shape, hidden_dim)), head))
        self.ids = rng.integers(0, vocabulary, (*shape, WANTED))
        self.ids[0, :4, 1], self.ids[1, 2, 0] = -1, vocabulary
        self.ids[1, 7, :] = self.ids[1, 7, 0]  # one id wanted three times receives three gradients
        self.temperature = rng.uniform(0.5, 2, shape).astype(np.float32) if temperature else None
        if temperature:
            self.temperature[1, 5] = 0  # greedy: reported at 1
        self.cotangent = [rng.normal(size=shape) for _ in range(3)] + [rng.normal(size=(*shape, WANTED))]
        scale = 1.0 if not temperature else 1 / np.where(self.temperature > 0, self.temperature, 1)
        self.scale = np.broadcast_to(np.asarray(scale, np.float64), shape)
        # From the rounded inputs: what is compared is the arithmetic, not the rounding of the inputs.
        self.hidden64, self.head64 = (np.asarray(x, np.float64) for x in (self.hidden, self.head))
        self.logits = self.hidden64 @ self.head64.T * self.scale[..., None]
        self.stats = expected_stats(self.logits, self.ids)

    def gradients(self):
        """d/d hidden and d/d head of sum(cotangent * stats), by the softmax Jacobian of every row, in float64."""
        g_lse, g_entropy, g_certainty, g_logits = self.cotangent
        log_p = self.logits - self.stats.lse[..., None]
        p = np.exp(log_p)
        vocabulary = p.shape[-1]
        # Entropy's gradient through p: dH/dp = -(log p + 1), and dp/dz = diag(p) - p p^T.
        by_p = -(log_p + 1)
        entropy = p * by_p - p * (p * by_p).sum(-1, keepdims=True)
        dense = g_lse[..., None] * p + g_entropy[..., None] * entropy + g_certainty[..., None] * (p - 1 / vocabulary)
        for row, token, place in np.ndindex(self.ids.shape):
            if 0 <= self.ids[row, token, place] < vocabulary:
                dense[row, token, self.ids[row, token, place]] += g_logits[row, token, place]
        dense *= self.scale[..., None]
        return dense @ self.head64, np.einsum("btv,btd->vd", dense, self.hidden64)

    def run(self, way):
        """Statistics and gradients of the implementation, under jit."""
        return gradients_of(self.hidden, self.head, self.ids, self.temperature, self.cotangent, way)


@functools.partial(jax.jit, static_argnames="way")
@functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
def gradients_of(hidden, head, ids, temperature, cotangent, way):
    stats = token_stats(hidden, head, ids, temperature=temperature, implementation=way[0], chunk_tokens=way[1])
    finite = stats._replace(logits=jnp.where(stats.logits > -jnp.inf, stats.logits, 0))
    return sum((each * g.astype(jnp.float32)).sum() for each, g in zip(finite, cotangent)), stats


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"temperature": False}, 1e-5),
        ({"dtype": "bfloat16"}, 1e-2),
        ({"spread": 30.0}, 1e-5),  # logits of several hundred, most rows one-hot
    ],
    ids=["plain", "no temperature", "bfloat16", "extreme"],
)
def test_values_and_gradients_equal_float64(way, options, tolerance, expected_stats, relative_error):
    problem = Problem(expected_stats, **options)
    (grad_hidden, grad_head), stats = problem.run(way)
    wanted = np.isfinite(problem.stats.logits)
    np.testing.assert_array_equal(np.asarray(stats.logits)[~wanted], -np.inf)
    assert relative_error(stats.logits[wanted], problem.stats.logits[wanted]) < 1e-6
    assert relative_error(stats.lse, problem.stats.lse) < 1e-6
    assert relative_error(stats.entropy, problem.stats.entropy) < 2e-5
    assert relative_error(stats.certainty, problem.stats.certainty) < 1e-6
    expected_hidden, expected_head = problem.gradients()
    assert relative_error(grad_hidden, expected_hidden) < tolerance
    assert relative_error(grad_head, expected_head) < tolerance
    assert (grad_hidden.dtype, grad_head.dtype) == (problem.hidden.dtype, problem.head.dtype)
    assert all(each.dtype == jnp.float32 for each in stats)


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_bfloat16_products_are_summed_in_float32(way, expected_stats):
    """Read from the program, because XLA for CPU may keep more precision than it is asked for."""
    problem = Problem(expected_stats, dtype="bfloat16")
    arguments = (problem.hidden, problem.head, problem.ids, problem.temperature, problem.cotangent)
    lines = str(jax.make_jaxpr(functools.partial(gradients_of, way=way))(*arguments)).splitlines()
    products = [line.split("=")[0] for line in lines if "= dot_general" in line]
    assert len(products) == 4  # logits, logits again, two gradients
    assert all(":f32[" in product for product in products)


@pytest.mark.parametrize("way", WAYS[::2], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 1), (2, 3, 5)], ids=str)
def test_any_number_of_leading_axes(way, shape, expected_stats):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(*shape, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    ids = rng.integers(0, 9, (*shape, 2))
    call = functools.partial(token_stats, temperature=0.5, implementation=way[0], chunk_tokens=way[1])
    got = jax.jit(call)(hidden, head, ids)
    expected = expected_stats(hidden.astype(np.float64) @ head.T * 2, ids)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", arg_specs.HEADS[::2], ids=lambda spec: spec.name)
@pytest.mark.parametrize("way", [("reference", None), ("chunked", 100)], ids=str)
def test_proportions_of_real_models(spec, way, expected_stats):
    spec = spec.scaled(64)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(spec.tokens, spec.hidden)).astype(np.float32)
    head = (rng.normal(size=(spec.vocabulary, spec.hidden)) / np.sqrt(spec.hidden)).astype(np.float32)
    ids = rng.integers(0, spec.vocabulary, (spec.tokens, 1))
    got = jax.jit(functools.partial(token_stats, implementation=way[0], chunk_tokens=way[1]))(hidden, head, ids)
    expected = expected_stats(hidden.astype(np.float64) @ head.T, ids)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("way", WAYS[::2], ids=str)
def test_log_prob_renormalises_over_kept_sets_that_mix_with_unfiltered_rows(way):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(ROWS, TOKENS, 8)).astype(np.float32)
    head = rng.normal(size=(31, 8)).astype(np.float32)
    token = rng.integers(0, 31, (ROWS, TOKENS))
    kept = np.full((ROWS, TOKENS, 5), -1)
    expected = np.zeros((ROWS, TOKENS))
    z = hidden.astype(np.float64) @ head.T / 0.7
    for place in np.ndindex(token.shape):
        used = rng.integers(0, 6)  # 0: unfiltered
        members = np.arange(31)
        if used:
            others = rng.permutation(np.delete(members, token[place]))[: used - 1]
            members = np.append(others, token[place])
            kept[place][rng.permutation(5)[:used]] = members
        expected[place] = z[place][token[place]] - np.log(np.exp(z[place][members]).sum())

    def total(hidden, head):
        arguments = {"kept": jnp.asarray(kept), "temperature": 0.7, "implementation": way[0], "chunk_tokens": way[1]}
        values = log_prob(hidden, head, jnp.asarray(token), **arguments)
        return values.sum(), values

    (_, got), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(each).all() for each in gradients)
    # A token that was its only candidate has log-prob 0 and moves nothing.
    alone = (kept >= 0).sum(-1) == 1
    assert alone.any()
    np.testing.assert_allclose(np.asarray(gradients[0])[alone], 0, atol=1e-6)


def test_log_prob_without_a_kept_set_is_that_of_the_whole_vocabulary(expected_stats):
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(7, 8)).astype(np.float32), rng.normal(size=(31, 8)).astype(np.float32)
    token = rng.integers(0, 31, 7)
    expected = expected_stats(hidden.astype(np.float64) @ head.T, token[:, None])
    compiled = jax.jit(log_prob)
    for kept in (None, np.zeros((7, 0), np.int32), np.full((7, 2), -1)):
        got = compiled(hidden, head, token, kept=kept)
        np.testing.assert_allclose(got, expected.logits[:, 0] - expected.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_entropy_is_not_computed_where_nobody_looks_at_it(way):
    """Its sum is a second exponential of every logit."""

    def exponentials(weight):
        def total(hidden, head, ids):
            stats = token_stats(hidden, head, ids, implementation=way[0], chunk_tokens=way[1])
            return (stats.logits[..., 0] - stats.lse + (weight * stats.entropy if weight else 0)).sum()

        shapes = jnp.zeros((ROWS, TOKENS, 8)), jnp.zeros((64, 8)), jnp.zeros((ROWS, TOKENS, 1), int)
        return jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile().as_text().count(" exponential(")

    assert exponentials(None) < exponentials(1.0)


def temporary_bytes(tokens: int, vocabulary: int, **options) -> int:
    """Temporaries of forward and backward together, as the compiler reports them."""

    def objective(hidden, head, ids):
        stats = token_stats(hidden, head, ids, **options)
        return (stats.logits[..., 0] - stats.lse + stats.entropy + stats.certainty).sum()

    shapes = [(2, tokens, 8), (vocabulary, 8), (2, tokens, 1)]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.int32))]
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    measure = functools.partial(temporary_bytes, vocabulary=4096, implementation="chunked", chunk_tokens=64)
    small, large = measure(128), measure(2048)
    added_tokens, all_logits = 2 * (2048 - 128), 4 * 2 * 2048 * 4096
    # What may grow is a handful of numbers a token (here D = 8): measured 60 bytes, against 16,384 for its logits.
    assert large - small <= 128 * added_tokens
    assert large < all_logits / 10
    reference = temporary_bytes(2048, 4096, implementation="reference")
    assert reference > all_logits  # the measurement sees logits where there are any


def test_default_budget_bounds_memory():
    assert temporary_bytes(4096, 4096) < 6 * max(api.CHUNK_BYTES["cpu"], 4 * 4096 * api.CHUNK_TOKENS_LEAST)


@pytest.mark.parametrize(("tokens", "limit", "length"), [(10, 20, 10), (10, 5, 5), (10, 4, 4), (9, 4, 3), (3, 0, 1)])
def test_chunk_length_makes_chunks_equal(tokens, limit, length):
    assert chunk_length(tokens, limit) == length


def test_wrong_arguments_name_both_values():
    hidden, head, ids = jnp.zeros((2, 3, 4)), jnp.zeros((9, 4)), jnp.zeros((2, 3, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(4, 9\)"):
        token_stats(hidden, head.T, ids)
    with pytest.raises(ValueError, match=r"hidden \(2, 3, 4\), got \(2, 3\)"):
        token_stats(hidden, head, ids[..., 0])
    with pytest.raises(ValueError, match="got float32"):
        token_stats(hidden, head, ids.astype(jnp.float32))
    with pytest.raises(ValueError, match="there are mosaic_gpu, mosaic_tpu, chunked, reference"):
        token_stats(hidden, head, ids, implementation="fused")


def sharded_gradient() -> None:
    """On 4 x 2 devices: the chunked gradient equals the reference, and only sums cross devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(16, 12, 8)).astype(np.float32), rng.normal(size=(64, 8)).astype(np.float32)
    ids = rng.integers(0, 64, (16, 12, 2), np.int32)

    def objective(hidden, head, ids, implementation, chunk_tokens):
        stats = token_stats(hidden, head, ids, implementation=implementation, chunk_tokens=chunk_tokens)
        return (stats.logits.sum(-1) - stats.lse + stats.entropy + stats.certainty).mean()

    gradient = jax.jit(jax.value_and_grad(objective, (0, 1)), static_argnums=(3, 4))
    expected = gradient(hidden, head, ids, "reference", None)
    operations = ("while", "all-reduce", "all-gather", "all-to-all", "collective-permute")
    for of_head in (P(), P("model")):  # the whole head on every device, and its vocabulary cut in two
        shardings = [NamedSharding(mesh, each) for each in (P("data"), of_head, P("data"))]
        arguments = [jax.device_put(*each) for each in zip((hidden, head, ids), shardings)]
        compiled = gradient.lower(*arguments, "chunked", 64).compile()
        found = {each for each in operations if each in compiled.as_text()}
        assert found == {"while", "all-reduce"}, (of_head, found)
        got = compiled(*arguments)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), got, expected)


def test_chunks_never_cross_data_shards_nor_gather_logits(run_on_devices):
    run_on_devices(sharded_gradient)


def test_several_devices_have_a_budget_each(monkeypatch):
    """64 tokens of 512 logits in float32 are 128 KiB: four chunks of one budget, one of four."""
    monkeypatch.setitem(api.CHUNK_BYTES, "cpu", 2**15)
    monkeypatch.setattr(api, "CHUNK_TOKENS_LEAST", 1)

    def loops(data, model):
        mesh = AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        shards = Shards(mesh, ("data",), "model")
        call = functools.partial(token_stats, implementation="chunked", shards=shards)
        shapes = jnp.zeros((2, 32, 8)), jnp.zeros((512, 8)), jnp.zeros((2, 32, 1), int)
        return re.findall(r"length=(\d+)", str(jax.make_jaxpr(call)(*shapes)))

    assert loops(1, 1) == ["4"]
    assert loops(2, 1) == loops(1, 2) == ["2"]
    assert loops(2, 2) == []


def test_naive_equals_float64(expected_stats, relative_error):
    problem = Problem(expected_stats)
    ids = np.clip(problem.ids, 0, len(problem.head) - 1)
    got = jax.jit(naive.token_stats)(problem.hidden, problem.head, ids, temperature=problem.temperature)
    for one, other in zip(got, expected_stats(problem.logits, ids)):
        assert relative_error(one, other) < 1e-5
    log_p = naive.log_prob(problem.hidden, problem.head, ids[..., 0], temperature=problem.temperature)
    assert relative_error(log_p, got.logits[..., 0] - got.lse) < 1e-5
