"""Every implementation against dense attention in float64, forward and gradient, on packed rows of random forests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.packed_attention import api, blockwise, cudnn, splash
from kernels.packed_attention.visibility import Visibility, live_blocks, visible
from rlrag.mesh import axes_of, make_mesh


def packed_rows(seed: int, rows: int, tokens: int, window: int | None = None) -> Visibility:
    """Families one after another: a prefix with up to three branches, lengths at random; what is left is padding."""
    dice = np.random.default_rng(seed)
    first, last, position = np.zeros((3, rows, tokens), np.int32)
    last += 1
    for row in range(rows):
        column, number = 0, 1
        while column < tokens - 30:
            branches, prefix = int(dice.integers(0, 4)), int(dice.integers(5, 60))
            lengths = [prefix, *dice.integers(1, 50, branches)]
            for branch, length in enumerate(lengths):
                cells = slice(column, min(column + int(length), tokens))
                count = cells.stop - cells.start
                first[row, cells] = number + branch
                last[row, cells] = number + branch + 1 if branch else number + 1 + branches
                position[row, cells] = np.arange(count) + (prefix if branch else 0)
                column = cells.stop
                if column == tokens:
                    break
            number += 1 + branches
    own = None if window is None else jnp.int32(window)
    return Visibility(jnp.asarray(first), jnp.asarray(last), jnp.asarray(position), own)


def inputs(seed: int, rows: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, tokens, heads, dim)] + [(rows, tokens, kv_heads, dim)] * 2 + [(rows, tokens, heads, dim)]
    query, key, value, cotangent = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes))
    return tuple(x.astype(dtype) for x in (query * dim**-0.5, key, value, cotangent))


def expected(query, key, value, cotangent, v: Visibility):
    """Output and gradients in float64, the softmax's written out."""
    q, k, val, d = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    group = q.shape[2] // k.shape[2]
    k, val = np.repeat(k, group, 2), np.repeat(val, group, 2)
    scores = np.where(np.asarray(visible(v))[:, None], np.einsum("binh,bjnh->bnij", q, k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bnij,bjnh->binh", p, val)
    dp = np.einsum("binh,bjnh->bnij", d, val)
    ds = p * (dp - np.sum(p * dp, -1, keepdims=True))

    def per_kv_head(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)

    dk, dv = per_kv_head(np.einsum("bnij,binh->bjnh", ds, q)), per_kv_head(np.einsum("bnij,binh->bjnh", p, d))
    return out, np.einsum("bnij,bjnh->binh", ds, k), dk, dv


def found(attend, query, key, value, cotangent, v: Visibility):
    out, back = jax.vjp(lambda *x: attend(*x, v), query, key, value)
    return out, *back(cotangent)


def close(results, wanted, bound):
    for name, one, other in zip(("out", "query", "key", "value"), results, wanted, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - other) <= bound * np.linalg.norm(other), name


IMPLEMENTATIONS = {
    "reference": lambda *x: api.attend(*x, implementation="reference"),
    "blockwise": blockwise.attend,
    "splash": lambda *x: splash.attend(*x, interpret=True),
}


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_and_gradients(name, window, monkeypatch):
    tokens, dim, rows = (256, 128, 1) if name == "splash" else (150, 8, 2)  # splash: the least that its tiles take
    if name == "blockwise":  # several blocks, of which none ends where the row does
        small = {"forward": blockwise.forward, "backward": blockwise.backward}
        for half, run in small.items():
            monkeypatch.setattr(blockwise, half, lambda *x, run=run: run(*x, sizes=(32, 16)))
    v = packed_rows(1, rows, tokens, window)
    arrays = inputs(0, rows, tokens, 4, 2, dim)
    close(jax.jit(lambda *x: found(IMPLEMENTATIONS[name], *x, v))(*arrays), expected(*arrays, v), 1e-6)


def test_bfloat16_by_blocks():
    v, arrays = packed_rows(2, 1, 300), inputs(1, 1, 300, 2, 2, 8, jnp.bfloat16)
    results = found(blockwise.attend, *arrays, v)
    assert all(each.dtype == jnp.bfloat16 for each in results)
    close(results, expected(*arrays, v), 1e-2)


@pytest.mark.parametrize("window", [None, 30])
def test_no_block_is_skipped_that_anyone_sees(window):
    v = packed_rows(3, 4, 192, window)
    live = np.asarray(live_blocks(v, 32, 16))
    wanted = np.asarray(visible(v)).reshape(4, 6, 32, 12, 16).any((2, 4))
    assert not (wanted & ~live).any()
    assert live.sum() <= 1.25 * wanted.sum(), "bounds are nearly as good as looking"
    assert live.mean() < 0.5


def test_what_is_not_visible_does_not_matter():
    v = packed_rows(4, 1, 600)
    query, key, value, _ = inputs(3, 1, 600, 2, 1, 8)
    unseen = 500  # a column seen by none before it
    before = blockwise.attend(query, key, value, v)[:, :unseen]
    key, value = key.at[:, unseen:].set(1e4), value.at[:, unseen:].set(-1e4)
    np.testing.assert_array_equal(before, blockwise.attend(query, key, value, v)[:, :unseen])


def test_the_choice_is_by_platform_and_shape():
    shape = {"head_dim": 64, "dtype": jnp.float32, "divided": True}
    names = {tokens: api.dispatch.choose("packed_attention", api.IMPLEMENTATIONS, None, tokens=tokens, **shape).default
             for tokens in (96, 2048)}  # fmt: skip
    assert names == {96: "reference", 2048: "blockwise"}
    half = {"dtype": jnp.bfloat16, "divided": True}
    assert cudnn.refuses(2048, 64, **half) is None
    assert splash.refuses(2048, 128, **half) is None
    for wrong in ({"tokens": 2047}, {"head_dim": 192}, {"dtype": jnp.float32}, {"divided": False}):
        assert cudnn.refuses(**{"tokens": 2048, "head_dim": 64, **half} | wrong)
    assert splash.refuses(2000, 128, **half) and splash.refuses(2048, 64, **half)
    query, key, value, _ = inputs(0, 1, 16, 3, 2, 8)
    with pytest.raises(ValueError, match="3 a multiple of K"):
        api.attend(query, key, value, packed_rows(0, 1, 16))


def program(attend, dtype=jnp.bfloat16):
    v, arrays = packed_rows(0, 2, 256), inputs(0, 2, 256, 4, 2, 128, dtype)
    return jax.jit(lambda *x: found(attend, *x, v)).trace(*arrays)


def test_cudnn_lowers_for_a_gpu(monkeypatch):
    """Forward and backward become cuDNN's calls; whether it takes them, a GPU would have to say."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = program(cudnn.attend).lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaScaleBiasSoftmax" in text and "fmhaScaleBiasSoftmaxBackward" in text


def test_splash_lowers_for_a_tpu():
    text = program(splash.attend).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3, "forward, and the gradients of queries and of keys and values"


def shards() -> None:
    v, arrays = packed_rows(5, 4, 800), inputs(2, 4, 800, 4, 2, 8)
    alone = found(blockwise.attend, *arrays, v)
    for data, model in ((4, 2), (2, 4)):  # four parts do not divide two kv heads
        with jax.set_mesh(make_mesh(data, model)):
            on_mesh = partial(api.attend, rows=axes_of("rows"), heads=axes_of("kv_heads"), implementation="blockwise")
            own = jax.jit(partial(found, on_mesh))(*arrays, v)
        print(max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(own, alone)) < 1e-5)


def test_a_mesh_changes_nothing(run_on_devices):
    assert run_on_devices(shards).split() == ["True", "True"]
