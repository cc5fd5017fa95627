"""The decoder against an independent float64 NumPy implementation, and its two layouts against each other."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.model.architecture import Architecture
from rlrag.model.attention import attend, views
from rlrag.model.decoding import pack
from rlrag.model.parameters import Transformer, initialize
from rlrag.model.transformer import ACTIVATIONS, extend, gated, trunk
from tests.episodes import VOCAB_SIZE, make_groups, pack_groups

PLAIN = Architecture(
    vocab_size=VOCAB_SIZE, num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40
)
VARIANTS = {
    "plain": PLAIN,
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, rope_theta=1e6),
    "untied": dataclasses.replace(PLAIN, tied=False, norm_epsilon=1e-5),
    "one_kv_head": dataclasses.replace(PLAIN, num_kv_heads=1),
    "all_kv_heads": dataclasses.replace(PLAIN, num_kv_heads=4, embed_scale=24**0.5),
    "everything": dataclasses.replace(PLAIN, qkv_bias=True, qk_norm=True, tied=False, embed_scale=1.7),
    "llama3": dataclasses.replace(PLAIN, rope_scaling="llama3", rope_factor=4.0, rope_high=3.0, rope_positions=16),
    "linear": dataclasses.replace(PLAIN, rope_scaling="linear", rope_factor=8.0),
    "window": dataclasses.replace(PLAIN, pattern="L", window=4),
    "mixed": dataclasses.replace(PLAIN, pattern="LG", window=3),
    "gemma3": dataclasses.replace(
        PLAIN,
        pattern="LLG",
        window=4,
        local_rope_theta=100.0,
        rope_scaling="linear",
        rope_factor=8.0,
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        activation="gelu_tanh",
        attention_scale=0.4,
        embed_scale=24**0.5,
    ),
}


def parameters(a: Architecture, key: int = 0) -> Transformer:
    """Random everywhere: norms too, which start as ones."""
    params = initialize(a, jax.random.key(key))
    leaves, tree = jax.tree.flatten(params)
    noise = [0.3 * jax.random.normal(jax.random.key(100 + i), leaf.shape) for i, leaf in enumerate(leaves)]
    spread = [leaf + n if (leaf == leaf.ravel()[0]).all() else leaf + 0.1 * n for leaf, n in zip(leaves, noise)]
    return jax.tree.unflatten(tree, spread)


def numpy_hidden(params: Transformer, a: Architecture, tokens: np.ndarray, positions: np.ndarray, sees) -> np.ndarray:
    """One row, token by token and head by head in float64; sees(i, j) says whether token i sees token j."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + a.norm_epsilon) * (scale + a.norm_offset)

    def activation(x):
        if a.activation == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def turn(x, position, local):
        half = a.head_dim // 2
        theta = a.local_rope_theta if local and a.local_rope_theta else a.rope_theta
        angle = position * np.array([rope_frequency(a, theta ** (-2 * i / a.head_dim), local) for i in range(half)])
        first, second = x[:half], x[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    def heads(x, weight, bias, scale, number, position, local):
        y = x @ weight if bias is None else x @ weight + bias
        split = y.reshape(number, a.head_dim)
        if scale is not None:
            split = np.array([norm(head, scale) for head in split])
        return split if position is None else np.array([turn(head, position, local) for head in split])

    x = p.embed[tokens] * a.embed_scale
    for n in range(a.num_layers):
        w = jax.tree.map(lambda leaf: leaf[n], p.layers)  # noqa: B023
        local = (a.pattern * a.num_layers)[n] == "L"
        normed = [norm(row, w.attention_norm) for row in x]
        q = [heads(r, w.query, w.query_bias, w.query_norm, a.num_heads, t, local) for r, t in zip(normed, positions)]
        k = [heads(r, w.key, w.key_bias, w.key_norm, a.num_kv_heads, t, local) for r, t in zip(normed, positions)]
        v = [heads(r, w.value, w.value_bias, None, a.num_kv_heads, None, local) for r in normed]
        mixed = []
        for i in range(len(x)):
            seen, out = [j for j in range(len(x)) if sees(i, j)], []
            if local:
                seen = [j for j in seen if positions[i] - positions[j] < a.window]
            for head in range(a.num_heads):
                shared = head // (a.num_heads // a.num_kv_heads)
                scores = np.array([q[i][head] @ k[j][shared] for j in seen]) * (a.attention_scale or a.head_dim**-0.5)
                weights = np.exp(scores - scores.max())
                out.append(sum(weight * v[j][shared] for weight, j in zip(weights / weights.sum(), seen)))
            y = np.concatenate(out) @ w.output
            mixed.append(norm(y, w.post_attention_norm) if a.post_norms else y)
        x = x + np.array(mixed)
        for i in range(len(x)):
            normed_row = norm(x[i], w.mlp_norm)
            y = (activation(normed_row @ w.gate) * (normed_row @ w.up)) @ w.down
            x[i] = x[i] + (norm(y, w.post_mlp_norm) if a.post_norms else y)
    return np.array([norm(row, p.final_norm) for row in x])


def rope_frequency(a: Architecture, plain: float, local: bool) -> float:
    """One frequency as the rules are told: by wavelengths, case by case."""
    if not a.rope_scaling or (local and a.local_rope_theta):
        return plain
    wavelength = 2 * np.pi / plain
    if a.rope_scaling == "linear" or wavelength > a.rope_positions / a.rope_low:
        return plain / a.rope_factor
    if wavelength < a.rope_positions / a.rope_high:
        return plain
    smooth = (a.rope_positions / wavelength - a.rope_low) / (a.rope_high - a.rope_low)
    return (1 - smooth) * plain / a.rope_factor + smooth * plain


@pytest.mark.parametrize("name", VARIANTS)
def test_trunk_equals_numpy(name):
    a, dice = VARIANTS[name], np.random.default_rng(3)
    params = parameters(a)
    tokens = dice.integers(VOCAB_SIZE, size=(2, 12))
    # Row 0: a prefix with two children, the second with a child of its own. Row 1: two strangers and padding.
    segment = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]])
    parent = np.array([[0, 0, 1, 1, 3], [0, 0, 0, 0, 0]])
    positions = np.array([[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0]])
    above = [{0: {0}, 1: {1}, 2: {1, 2}, 3: {1, 3}, 4: {1, 3, 4}}, {0: {0}, 1: {1}, 2: {2}}]
    hidden = np.asarray(jax.jit(trunk, static_argnums=1)(params, a, tokens, positions, segment, parent))
    for row in range(2):

        def sees(i, j, row=row):
            return j <= i and segment[row, j] in above[row][segment[row, i]]

        expected = numpy_hidden(params, a, tokens[row], positions[row], sees)
        real = segment[row] > 0
        np.testing.assert_allclose(hidden[row][real], expected[real], atol=3e-5)
    assert np.isfinite(hidden).all()


@partial(jax.jit, static_argnums=(1, 3))
def cached_hidden(params, a, tokens, cuts):
    """Hidden states of `tokens` [B, T] with the decode layout and a dense cache, appended piece by piece."""
    weights = pack(params, a)
    B, T = tokens.shape
    keys = [jnp.zeros((a.num_kv_heads, B, T, a.head_dim), a.dtype) for _ in range(a.num_layers)]
    values = list(keys)
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, T]):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
        seen = views(a, jnp.arange(T) <= positions[..., None], positions, jnp.arange(T)[None])

        def mix(number, q, k, v, start=start, seen=seen):
            keys[number] = jax.lax.dynamic_update_slice_in_dim(keys[number], k.transpose(2, 0, 1, 3), start, 2)
            values[number] = jax.lax.dynamic_update_slice_in_dim(values[number], v.transpose(2, 0, 1, 3), start, 2)
            return attend(q, keys[number], values[number], seen[a.local[number]], a.attention_scale or None)

        pieces.append(extend(weights, a, tokens[:, start:stop], positions, mix))
    return jnp.concatenate(pieces, 1)


@pytest.mark.parametrize("name", ["everything", "one_kv_head", "gemma3"])
def test_extending_a_cache_equals_the_trunk(name):
    a = VARIANTS[name]
    params = parameters(a)
    tokens = jax.random.randint(jax.random.key(5), (3, 11), 0, VOCAB_SIZE)
    positions = jnp.broadcast_to(jnp.arange(11), (3, 11))
    whole = jax.jit(trunk, static_argnums=1)(
        params, a, tokens, positions, jnp.ones((3, 11), jnp.int32), jnp.zeros((3, 2), jnp.int32)
    )
    np.testing.assert_allclose(cached_hidden(params, a, tokens, (4, 5, 6, 9)), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["everything", "gemma3"])
def test_packed_rows_give_the_logits_of_separate_rows(name):
    """Streams that share a prefix, lie behind strangers or before padding: the same logits as alone."""
    a = VARIANTS[name]
    params = parameters(a)
    groups = make_groups(5, 3, 4)
    packed = pack_groups(groups)
    batch = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), packed.batch)
    forward = jax.jit(trunk, static_argnums=1)
    together = forward(params, a, batch.tokens, batch.positions, batch.segment, batch.segments.parent)
    streams = [t.streams for group in groups for t in group.trajectories]
    assert any(place.start > 0 for place in packed.places)
    for place in packed.places:
        tokens = np.zeros((1, 96), np.int32)
        stream = streams[place.episode][place.call]
        tokens[0, : stream.num_tokens] = stream.tokens
        segment = (np.arange(96) < stream.num_tokens).astype(np.int32)[None]
        alone = forward(params, a, tokens, np.arange(96)[None], segment, np.zeros((1, 2), np.int32))
        mine = together[place.row, place.column : place.column + place.count] @ params.output_head.T
        wanted = alone[0, place.start : stream.num_tokens] @ params.output_head.T
        np.testing.assert_allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_the_gated_mlp_is_that_of_the_plain_formula(activation):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(7, 6), (6, 10), (6, 10), (10, 6), (7, 6)]
    *arguments, weight = (np.asarray(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes))

    def plain(x, gate, up, down):
        return (ACTIVATIONS[activation][0](x @ gate) * (x @ up)) @ down

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weight), (0, 1, 2, 3)))(*arguments)

    for mine, wanted in zip(jax.tree.leaves(both(partial(gated, activation=activation))), jax.tree.leaves(both(plain))):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


def relative(mine, wanted) -> float:
    mine, wanted = np.asarray(mine, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(mine - wanted) / max(np.linalg.norm(wanted), 1e-30))


def loss(params, a, batch):
    hidden = trunk(params, a, batch.tokens[0], batch.positions[0], batch.segment[0], batch.segments.parent[0])
    return jnp.sum(jnp.tanh(hidden.astype(jnp.float32)) ** 2 * batch.trained[0][..., None])


@pytest.mark.parametrize("name", ["everything", "gemma3"])
def test_remat_and_unrolling_change_nothing(name):
    batch = jax.tree.map(jnp.array, pack_groups(make_groups(1)).batch)
    a = VARIANTS[name]
    params = parameters(a)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = step(params, a, batch)
    for changes in ({"remat": True, "scan_unroll": 2}, {"scan_unroll": 99}):
        other_value, other = step(params, dataclasses.replace(a, **changes), batch)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        assert max(map(relative, jax.tree.leaves(other), jax.tree.leaves(gradient))) < 1e-5


def test_bfloat16_stays_near_float32():
    batch = jax.tree.map(jnp.array, pack_groups(make_groups(1)).batch)
    a = VARIANTS["everything"]
    params = parameters(a)
    low = dataclasses.replace(a, dtype="bfloat16")
    (value, gradient), (low_value, low_gradient) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, each, batch) for each in (a, low)
    )
    assert float(low_value) == pytest.approx(float(value), rel=0.02)
    for mine, wanted in zip(jax.tree.leaves(low_gradient), jax.tree.leaves(gradient)):
        assert mine.dtype == jnp.float32
        assert relative(mine, wanted) < 0.2
    tokens = jax.random.randint(jax.random.key(5), (2, 8), 0, VOCAB_SIZE)
    hidden, low_hidden = (cached_hidden(params, each, tokens, (3,)) for each in (a, low))
    assert low_hidden.dtype == jnp.bfloat16
    assert relative(low_hidden, hidden) < 0.05


def test_a_token_never_changes_what_came_before_it():
    a = VARIANTS["everything"]
    params = parameters(a)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(1, 10))
    rest = (np.arange(10)[None], np.ones((1, 10), np.int32), np.zeros((1, 2), np.int32))
    forward = jax.jit(trunk, static_argnums=1)
    before = forward(params, a, tokens, *rest)
    tokens[0, 6] = (tokens[0, 6] + 1) % VOCAB_SIZE
    after = forward(params, a, tokens, *rest)
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert (before[0, 6:] != after[0, 6:]).any(-1).all()
