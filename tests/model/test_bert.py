"""The encoder against an independent float64 NumPy implementation; torch's numbers are in test_hf.py."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.mesh import make_mesh
from rlrag.model.architecture import EncoderArchitecture
from rlrag.model.bert import Bert, describe, encode, initialize, shardings
from rlrag.model.parameters import is_leaf
from rlrag.model.pooling import embed

SMALL = EncoderArchitecture(vocab_size=40, num_layers=3, embed_dim=12, num_heads=3, mlp_dim=20, max_positions=16)
forward = jax.jit(encode, static_argnums=1)


def parameters(a: EncoderArchitecture) -> Bert:
    """Random everywhere and large: norms and biases too, which start as ones and zeros."""
    leaves, tree = jax.tree.flatten(initialize(a, jax.random.key(0)))
    noise = [0.3 * jax.random.normal(jax.random.key(100 + i), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [(leaf == 1) + n for leaf, n in zip(leaves, noise)])


def texts(dice: np.random.Generator, lengths: list[list[int]], num_tokens: int):
    """Rows that hold texts of the lengths: tokens, positions, segment [B, T]."""
    tokens, positions, segment = np.zeros((3, len(lengths), num_tokens), np.int32)
    tokens[:] = dice.integers(SMALL.vocab_size, size=tokens.shape)
    for row, each in enumerate(lengths):
        start = 0
        for number, length in enumerate(each, 1):
            positions[row, start : start + length] = np.arange(length)
            segment[row, start : start + length] = number
            start += length
    return tokens, positions, segment


def numpy_hidden(params: Bert, a: EncoderArchitecture, tokens: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """One text, token by token and head by head in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    erf = np.vectorize(math.erf)

    def norm(x, scale, bias):
        return (x - x.mean()) / np.sqrt(x.var() + a.norm_epsilon) * scale + bias

    x = [
        norm(p.word[token] + p.position[i] + p.token_type[kind], p.embed_norm, p.embed_norm_bias)
        for i, (token, kind) in enumerate(zip(tokens, kinds))
    ]
    for n in range(a.num_layers):
        w = jax.tree.map(lambda leaf: leaf[n], p.layers)  # noqa: B023
        q, k, v = (
            [(row @ weight + bias).reshape(a.num_heads, a.head_dim) for row in x]
            for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
        )
        for i in range(len(x)):
            out = []
            for head in range(a.num_heads):
                scores = np.array([q[i][head] @ other[head] for other in k]) / np.sqrt(a.head_dim)
                weights = np.exp(scores) / np.exp(scores).sum()
                out.append(sum(weight * other[head] for weight, other in zip(weights, v)))
            mixed = np.concatenate(out) @ w.output + w.output_bias
            y = norm(x[i] + mixed, w.attention_norm, w.attention_norm_bias)
            hidden = y @ w.up + w.up_bias
            hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
            x[i] = norm(y + hidden @ w.down + w.down_bias, w.mlp_norm, w.mlp_norm_bias)
    return np.array(x)


def test_every_text_equals_numpy_wherever_it_lies():
    params, dice = parameters(SMALL), np.random.default_rng(0)
    lengths = [[5, 1, 7], [16], [3]]
    tokens, positions, segment = texts(dice, lengths, 16)
    kinds = dice.integers(2, size=tokens.shape)
    hidden = np.asarray(forward(params, SMALL, tokens, positions, segment, kinds))
    for row, each in enumerate(lengths):
        for number in range(1, len(each) + 1):
            mine = segment[row] == number
            wanted = numpy_hidden(params, SMALL, tokens[row, mine], kinds[row, mine])
            np.testing.assert_allclose(hidden[row, mine], wanted, atol=1e-5)
    assert np.isfinite(hidden).all()


def test_token_types_are_zeros_where_none_are_given():
    params, row = parameters(SMALL), texts(np.random.default_rng(0), [[9]], 16)
    np.testing.assert_array_equal(forward(params, SMALL, *row), forward(params, SMALL, *row, np.zeros((1, 16), int)))


def test_every_leaf_is_as_described():
    params = initialize(dataclasses.replace(SMALL, param_dtype="bfloat16"), jax.random.key(0))
    for value, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(describe(SMALL), is_leaf=is_leaf), strict=True):
        assert value.shape == leaf.shape
        assert len(leaf.axes) == len(leaf.shape)
        assert value.dtype == jnp.bfloat16
        assert float(value.astype(jnp.float32).std()) == pytest.approx(leaf.stddev, rel=0.25)
        assert leaf.stddev > 0 or (value == leaf.mean).all()


def loss(params, a, tokens, positions, segment):
    """Contrastive: segment 1 of every row against segment 2 of all rows (InfoNCE, van den Oord et al. 2018, eq. 4)."""
    vectors = embed(params, a, tokens, positions, segment, 3, pooling="mean", normalize=True)
    scores = vectors[:, 1] @ vectors[:, 2].T / 0.05
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores)))


def test_gradients_are_finite_and_recomputing_changes_nothing():
    rows = texts(np.random.default_rng(1), [[5, 3], [2, 9], [7, 0], [1, 1]], 16)  # the third has no second text
    params, step = parameters(SMALL), jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = step(params, SMALL, *rows)
    assert float(value) > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        # The same number added to all scores of a query changes nothing: the key's bias has no gradient.
        assert (np.abs(leaf).max() > 1e-6) == ("key_bias" not in jax.tree_util.keystr(path))
    other_value, other = step(params, dataclasses.replace(SMALL, remat="all", scan_unroll=2), *rows)
    assert float(other_value) == pytest.approx(float(value), rel=1e-5)
    for mine, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(mine, wanted, atol=1e-4)


def test_a_step_along_the_gradient_changes_the_loss_by_its_square():
    """A float32 difference quotient along the gradient itself, where it is largest."""
    rows, params = texts(np.random.default_rng(2), [[5, 3], [2, 9], [4, 4]], 16), parameters(SMALL)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    gradient = step(params, SMALL, *rows)[1]
    square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient))
    size = 1e-2 / square**0.5

    def at(sign):
        return float(step(jax.tree.map(lambda p, g: p + sign * size * g, params, gradient), SMALL, *rows)[0])

    assert (at(1) - at(-1)) / (2 * size) == pytest.approx(square, rel=0.02)


def test_bfloat16_stays_near_float32():
    rows, params = texts(np.random.default_rng(3), [[16], [9]], 16), parameters(SMALL)
    low = forward(params, dataclasses.replace(SMALL, dtype="bfloat16"), *rows)
    assert low.dtype == jnp.bfloat16
    difference = np.asarray(low, np.float32) - np.asarray(forward(params, SMALL, *rows))
    assert np.abs(difference).mean() < 0.05


def print_sum() -> None:
    a = dataclasses.replace(SMALL, num_heads=2)
    mesh = make_mesh(2, 2)
    rows = texts(np.random.default_rng(1), [[5, 3], [2, 9], [7, 4], [1, 1]], 16)
    with jax.set_mesh(mesh):
        params = jax.jit(partial(initialize, a), out_shardings=shardings(a, mesh))(jax.random.key(0))
        print(tuple(params.layers.up.sharding.spec), params.layers.up.addressable_shards[0].data.shape)
        print(float(jax.jit(loss, static_argnums=1)(params, a, *rows)))


def test_laid_over_devices_it_is_the_same(run_on_devices):
    shape, value = run_on_devices(print_sum, 4).splitlines()
    assert shape == "(None, 'data', 'model') (3, 6, 10)"
    a = dataclasses.replace(SMALL, num_heads=2)
    rows = texts(np.random.default_rng(1), [[5, 3], [2, 9], [7, 4], [1, 1]], 16)
    assert float(value) == pytest.approx(float(loss(initialize(a, jax.random.key(0)), a, *rows)), abs=1e-5)
