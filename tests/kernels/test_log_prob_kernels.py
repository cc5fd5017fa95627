"""The accelerator kernels of log_prob on CPU: in the interpreters against float64, lowered for their platform, and on
meshes, each device with its part of the vocabulary.

The interpreters fill memory with NaN before it is written and detect races (``kernels.interpret``); tiles are the
smallest that the hardware allows, so that a small problem has several in every direction and a part of one at the end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import arg_specs, interpret
from kernels.log_prob import hopper_product, mosaic_gpu, mosaic_tpu, tiled, token_stats
from kernels.log_prob.vocabulary_parallel import Shards
from kernels.token_stats import TokenStats
from tests.kernels.test_log_prob import Problem

SMALLEST = {
    "mosaic_gpu": {"block_m": 64, "block_n": 64, "stages": 2},
    "mosaic_tpu": {"block_m": 16, "block_n": 128},
}
MODULES = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
GPU_TILES, TPU_TILES = mosaic_gpu.TILES, mosaic_tpu.TILES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, sizes in SMALLEST.items():
        monkeypatch.setattr(MODULES[name], "TILES", (sizes,))
    monkeypatch.setattr(tiled, "BLOCK_BYTES_LEAST", 2**12)  # several blocks of the vocabulary in the backward pass


def check(problem, name, relative_error, tolerance):
    with interpret.interpreted():
        (grad_hidden, grad_head), stats = problem.run((name, None))
        jax.block_until_ready(stats)
    check_values(problem.stats, stats, relative_error)
    expected_hidden, expected_head = problem.gradients()
    assert relative_error(grad_hidden, expected_hidden) < tolerance
    assert relative_error(grad_head, expected_head) < tolerance
    assert (grad_hidden.dtype, grad_head.dtype) == (problem.hidden.dtype, problem.head.dtype)


def check_values(expected, stats, relative_error):
    wanted = np.isfinite(expected.logits)
    np.testing.assert_array_equal(np.asarray(stats.logits)[~wanted], -np.inf)
    assert relative_error(stats.logits[wanted], expected.logits[wanted]) < 1e-6
    assert relative_error(stats.lse, expected.lse) < 1e-6
    # Where all is near one token, what is left of it is the rounding of logits of several hundred.
    np.testing.assert_allclose(stats.entropy, expected.entropy, rtol=2e-5, atol=2e-4)
    assert relative_error(stats.certainty, expected.certainty) < 1e-6
    assert all(each.dtype == jnp.float32 for each in stats)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"temperature": False, "vocabulary": 256}, 1e-5),  # whole tiles
        ({"dtype": "bfloat16"}, 1e-2),
        ({"spread": 10.0}, 1e-5),  # logits of several hundred, most rows one-hot
    ],
    ids=["plain", "no temperature", "bfloat16", "extreme"],
)
def test_tpu_equals_float64(options, tolerance, expected_stats, relative_error):
    problem = Problem(expected_stats, **{"hidden_dim": 128, "vocabulary": 300, "spread": 0.1, **options})
    check(problem, "mosaic_tpu", relative_error, tolerance)


def test_gpu_equals_float64(expected_stats, relative_error, monkeypatch):
    """Two programs, each with three tiles of 64 vocabulary entries, the last moved left, and two steps over D: every
    place in shared memory is used again."""
    monkeypatch.setattr(hopper_product, "num_programs", lambda: 2)
    monkeypatch.setattr(tiled, "BLOCK_BYTES_LEAST", 2**15)
    problem = Problem(expected_stats, hidden_dim=128, vocabulary=332, dtype="bfloat16", spread=0.3)
    check(problem, "mosaic_gpu", relative_error, 1e-2)


def offset(expected_stats, tokens: int, vocabulary: int) -> Problem:
    """All logits have 1e4 in common."""
    problem = Problem(expected_stats, 128, vocabulary, spread=0.1, dtype="bfloat16", temperature=False, tokens=tokens)
    problem.hidden, problem.head = problem.hidden.at[..., 0].set(1), problem.head.at[:, 0].set(1e4)
    logits = np.asarray(problem.hidden, np.float64) @ np.asarray(problem.head, np.float64).T
    problem.stats = expected_stats(logits, problem.ids)
    return problem


@pytest.mark.parametrize(("name", "tokens"), [("mosaic_tpu", 13), ("mosaic_gpu", 65)])
def test_a_common_offset_cancels(name, tokens, expected_stats):
    """What is left is the rounding of a float32 logit of 1e4, 0.001. Fewer vocabulary entries than a tile has, and on
    the GPU two blocks of tokens."""
    problem = offset(expected_stats, tokens, 50)
    with interpret.interpreted():
        call = functools.partial(token_stats, implementation=name)
        stats = jax.block_until_ready(jax.jit(call)(problem.hidden, problem.head, problem.ids))
    for got, expected in zip(stats[:3], problem.stats[:3]):
        np.testing.assert_allclose(got, expected, atol=3e-3)


def test_a_confident_token_keeps_its_gradient(expected_stats, relative_error):
    """p = 0.999: of g (1 - p), summed in bfloat16, nothing would be left."""
    problem = Problem(expected_stats, hidden_dim=128, vocabulary=256, dtype="bfloat16", temperature=False)
    logits = np.full((2, 13, 256), 0.0)
    problem.ids = problem.ids.clip(0, 255)
    np.put_along_axis(logits, problem.ids[..., :1], 12.0, -1)
    # hidden @ head^T of these logits, exactly: one-hot rows.
    problem.hidden = jnp.zeros((2, 13, 128), jnp.bfloat16).at[..., 0].set(1)
    problem.head = jnp.zeros((256, 128), jnp.bfloat16).at[7, 0].set(12)
    ids = np.full((2, 13, 1), 7)

    def log_p(hidden, head, name):
        stats = token_stats(hidden, head, ids, implementation=name)
        return (stats.logits[..., 0] - stats.lse).sum()

    expected = 26 * (1 - np.exp(12.0) / (np.exp(12.0) + 255))
    with interpret.interpreted():
        got = jax.jit(jax.grad(log_p, 1), static_argnums=2)(problem.hidden, problem.head, "mosaic_tpu")
    assert float(got[7, 0]) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("mosaic_gpu", {"hidden": 128, "dtype": jnp.float32}, "float32"),
        ("mosaic_gpu", {"hidden": 100, "dtype": jnp.bfloat16}, "100 is not a multiple of 64"),
        ("mosaic_tpu", {"hidden": 64, "dtype": jnp.float32}, "64 is not a multiple of 128"),
    ],
)
def test_unsupported_shapes_are_named(name, arguments, reason):
    assert reason in MODULES[name].refuses(**arguments)
    shape = (1, 4, arguments["hidden"])
    with interpret.interpreted(), pytest.raises(ValueError, match=reason):
        token_stats(
            jnp.zeros(shape, arguments["dtype"]),
            jnp.zeros((9, shape[-1]), arguments["dtype"]),
            jnp.zeros((1, 4, 1), int),
            implementation=name,
        )


@pytest.mark.parametrize(("name", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")])
def test_outside_the_interpreters_a_kernel_is_refused(name, platform):
    arguments = jnp.zeros((1, 4, 128)), jnp.zeros((9, 128)), jnp.zeros((1, 4, 1), int)
    with pytest.raises(ValueError, match=f"runs on {platform}, not on cpu; here: chunked, reference"):
        token_stats(*arguments, implementation=name)


def lower(name: str, spec: arg_specs.HeadSpec, tiles: dict[str, int]) -> str:
    """Both kernels for their platform: shared memory, layouts and the rules of each operation are checked."""
    platform, tokens = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}[name], spec.tokens
    shapes = [(1, tokens, spec.hidden), (spec.vocabulary, spec.hidden)]
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    ids, one = jax.ShapeDtypeStruct((1, tokens, 1), jnp.int32), jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    cotangent = TokenStats(one, one, one, jax.ShapeDtypeStruct((1, tokens, 1), jnp.float32))
    module = MODULES[name]

    def both(hidden, head, ids, scale, lse, entropy, cotangent):
        stats = module.forward(hidden, head, ids, scale, **tiles)
        return stats, module.backward(hidden, head, ids, scale, lse, entropy, cotangent, **tiles)

    traced = jax.jit(both).trace(hidden, head, ids, one, one, one, cotangent)
    return traced.lower(lowering_platforms=(platform,)).as_text()


CALL = {"mosaic_gpu": "mosaic_gpu", "mosaic_tpu": "tpu_custom_call"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("spec", arg_specs.HEADS[::2], ids=lambda spec: spec.name)
def test_real_shapes_are_lowered_for_their_platform(name, spec, monkeypatch):
    monkeypatch.setattr(hopper_product, "num_programs", lambda: 132)
    monkeypatch.setattr(tiled, "BLOCK_BYTES_LEAST", 2**28)
    tiles = {"mosaic_gpu": GPU_TILES, "mosaic_tpu": TPU_TILES}[name][0]
    assert lower(name, spec, tiles).count(CALL[name]) >= 2


@pytest.mark.parametrize("tiles", GPU_TILES[1:], ids=str)
def test_every_candidate_fits_shared_memory(tiles, monkeypatch):
    monkeypatch.setattr(hopper_product, "num_programs", lambda: 132)
    lower("mosaic_gpu", arg_specs.HEADS[0]._replace(tokens=512), tiles)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "splits"), [(4096, 151_936, 8), (16_384, 151_936, 2), (256, 151_936, 127), (256, 300, 3)]
)
def test_splits_leave_few_multiprocessors_idle(tokens, vocabulary, splits, monkeypatch):
    monkeypatch.setattr(hopper_product, "num_programs", lambda: 132)
    cut = hopper_product.tiling(tokens, vocabulary, 128, 128, 3)
    assert cut.edge(0) == 0 and cut.edge(cut.splits) == cut.num_tiles
    waves = -(-cut.num_rows * cut.splits // 132)
    assert cut.num_tiles < 132 or cut.num_rows * cut.splits / (132 * waves) > 0.96
    assert cut.splits == splits


@pytest.mark.parametrize(("tokens", "width"), [(4096, 30_464), (16_384, 8_064), (100, 151_936)])
def test_blocks_of_dz_follow_the_budget(tokens, width):
    found = tiled.block_width(tokens, 151_936, 2, 128, 2**28)
    assert found == width and found % 128 == 0
    assert 2 * tokens * found <= 2**28


def sharded() -> None:
    """On meshes of eight devices: equal to the reference on one, and only numbers of tokens cross devices."""
    mosaic_tpu.TILES = ({"block_m": 16, "block_n": 128},)
    rng = np.random.default_rng(0)
    head = rng.normal(size=(512, 128)).astype(np.float32)
    hidden = (rng.normal(size=(8, 12, 128)) * 0.2).astype(np.float32)
    ids = rng.integers(-1, 513, (8, 12, 2), np.int32)
    temperature = rng.uniform(0.5, 2, (8, 12)).astype(np.float32)

    def objective(hidden, head, ids, temperature, name, shards, chunk=None):
        call = functools.partial(token_stats, temperature=temperature, implementation=name, chunk_tokens=chunk)
        stats = call(hidden, head, ids, shards=shards)
        wanted = jnp.where(stats.logits > -jnp.inf, stats.logits, 0).sum(-1)
        weights = jnp.arange(hidden.shape[0] * 12.0).reshape(-1, 12) / 100
        return (weights * (wanted - 2 * stats.lse + stats.entropy + 3 * stats.certainty)).sum(), stats

    gradient = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True), static_argnums=(4, 5, 6))
    operations = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    cases = [
        ((4, 2), 8, 512, "chunked", 8),
        ((4, 2), 8, 512, "mosaic_tpu", None),
        ((2, 4), 8, 512, "mosaic_tpu", None),
        ((4, 2), 8, 511, "chunked", None),  # a vocabulary that is not cut
        ((4, 2), 6, 512, "reference", None),  # rows that are not
        ((8, 1), 8, 512, "chunked", 8),
    ]
    for (data, model), rows, vocabulary, name, chunk in cases:
        whole = hidden[:rows], head[:vocabulary], ids[:rows], temperature[:rows]
        expected = gradient(*whole, "reference", None, None)
        mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        shards = Shards(mesh, ("data",), "model")
        parts = shards.fitted(rows, vocabulary)
        by_rows, by_entry = P(parts.rows), P(parts.vocabulary)
        where = [NamedSharding(mesh, spec) for spec in (by_rows, by_entry, by_rows, by_rows)]
        arguments = [jax.device_put(*each) for each in zip(whole, where)]
        with interpret.interpreted():
            compiled = gradient.lower(*arguments, name, shards, chunk).compile()
        assert {each for each in operations if each in compiled.as_text()} <= {"all-reduce"}
        got = compiled(*arguments)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4), got, expected)
        print("equal")


def test_any_implementation_runs_on_shards(run_on_devices):
    assert run_on_devices(sharded).split() == ["equal"] * 6
