import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.packed_attention.visibility import visible as written_out
from rlrag.model.architecture import Architecture
from rlrag.model.attention import ancestors, attend, frequencies, intervals, rotate, rotation, visibility


def rotary(x, positions, theta):
    return rotate(x, *rotation(positions, frequencies(Architecture(head_dim=x.shape[-1], rope_theta=theta))))


def test_rotation_is_a_complex_product():
    """Pair (i, i + H/2) is one complex number, turned by position * theta^(-2i/H)."""
    dice = np.random.default_rng(0)
    x = dice.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = dice.integers(0, 500, (2, 5))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * 1e4 ** (-2 * np.arange(4) / 8))
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotary(jnp.array(x), jnp.array(positions), 1e4), expected, atol=2e-4)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    near = rotary(q, jnp.array([[9]]), 1e4) * rotary(k, jnp.array([[4]]), 1e4)
    far = rotary(q, jnp.array([[109]]), 1e4) * rotary(k, jnp.array([[104]]), 1e4)
    np.testing.assert_allclose(near.sum(), far.sum(), rtol=1e-4)


def is_ancestor(parent: np.ndarray, column: int, row: int) -> bool:
    """Whether `column` is `row` or lies above it, one parent at a time."""
    while row != column and row > 0:
        row = int(parent[row])
        if row == 0:
            return False
    return row == column


@st.composite
def forests(draw):
    """parent [S]: any forest over segments 1 ... S-1 of depth up to 9, in any order of numbers."""
    num_segments = draw(st.integers(1, 12))
    order = draw(st.permutations(range(1, num_segments)))
    parent, depth = np.zeros(num_segments, np.int32), {0: 0}
    for i, segment in enumerate(order):
        choices = [0] + [s for s in order[:i] if depth[s] < 9]
        parent[segment] = draw(st.sampled_from(choices))
        depth[segment] = depth[int(parent[segment])] + 1
    return parent


@jax.jit
def rule(segment, parent):
    seen = visibility(Architecture(), segment, parent, jnp.zeros_like(segment))
    return ancestors(parent), *intervals(parent), written_out(seen[False])


@settings(deadline=None, max_examples=60)
@given(forests(), st.integers(0, 1000))
def test_mask_rule(parent, seed):
    """Token i sees token j iff j <= i and j's segment is i's or an ancestor of it."""
    segment = np.random.default_rng(seed).integers(0, len(parent), (1, 15))
    parent = np.pad(parent, (0, 12 - len(parent)))  # one shape, one compilation
    table, first, last, visible = (np.asarray(each)[0] for each in rule(jnp.array(segment), jnp.array(parent[None])))
    wanted = [[is_ancestor(parent, j, i) for j in range(len(parent))] for i in range(len(parent))]
    np.testing.assert_array_equal(table, wanted)
    assert sorted(first) == list(range(1, len(parent) + 1)), "every segment has a number of its own"
    assert (last > first).all()
    for i in range(15):
        for j in range(15):
            assert visible[i, j] == (j <= i and is_ancestor(parent, segment[0, j], segment[0, i]))


def softmax_attention(query, key, value, visible):
    """Loops in float64: query [B, C, N, H]; key, value [K, B, S, H]; visible [B, C, S]."""
    B, C, N, H = query.shape
    group = N // key.shape[0]
    out = np.zeros(query.shape)
    for b in range(B):
        for c in range(C):
            for n in range(N):
                at = np.flatnonzero(visible[b, c])
                scores = key[n // group, b, at].astype(np.float64) @ query[b, c, n] / np.sqrt(H)
                p = np.exp(scores - scores.max())
                out[b, c, n] = (p / p.sum()) @ value[n // group, b, at]
    return out


@pytest.fixture
def case():
    dice = np.random.default_rng(1)
    query = dice.normal(size=(2, 5, 6, 4)).astype(np.float32)
    key, value = dice.normal(size=(2, 3, 2, 7, 4)).astype(np.float32)
    visible = dice.random((2, 5, 7)) < 0.5
    visible[..., 0] = True
    return query, key, value, visible


def test_grouped_queries_against_loops(case):
    np.testing.assert_allclose(attend(*map(jnp.array, case)), softmax_attention(*case), atol=1e-6)


def test_gradient_is_that_of_the_plain_formula(case):
    query, key, value, visible = map(jnp.array, case)
    weight = jax.random.normal(jax.random.key(2), query.shape)

    def plain(query, key, value):
        group = query.shape[2] // key.shape[0]
        key, value = jnp.repeat(key, group, 0), jnp.repeat(value, group, 0)
        scores = jnp.einsum("bcnh,nbsh->bncs", query, key) / query.shape[-1] ** 0.5
        p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), -1)
        return jnp.sum(jnp.einsum("bncs,nbsh->bcnh", p, value) * weight)

    ours = jax.grad(lambda *x: jnp.sum(attend(*x, visible) * weight), (0, 1, 2))(query, key, value)
    for mine, wanted in zip(ours, jax.grad(plain, (0, 1, 2))(query, key, value)):
        np.testing.assert_allclose(mine, wanted, atol=2e-6)


def test_a_row_that_sees_nothing_is_finite(case):
    query, key, value, visible = case
    visible[1, 2] = False
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.array(visible)), *map(jnp.array, (query, key, value)))
    assert np.isfinite(out).all()
    assert all(np.isfinite(gradient).all() for gradient in back(jnp.ones_like(out)))


def test_what_is_not_visible_does_not_matter(case):
    query, key, value, visible = case
    before = attend(*map(jnp.array, case))
    hidden = ~visible.any(1)  # [B, S] seen by no token of the row
    hidden[:, -1] = True
    visible[..., -1] = False
    before = attend(*map(jnp.array, (query, key, value, visible)))
    key[:, hidden], value[:, hidden] = 1e3, 1e3
    np.testing.assert_array_equal(before, attend(*map(jnp.array, (query, key, value, visible))))


def test_the_published_frequencies_of_llama_3():
    """Llama 3.1: theta 500,000, factor 8, low 1, high 4, 8,192 positions, heads of 128. Its shortest wavelengths stay,
    its longest are eight times longer, and one between is a mixture."""
    a = Architecture(
        head_dim=128, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0, rope_low=1.0, rope_high=4.0,
        rope_positions=8192,
    )  # fmt: skip
    plain = 5e5 ** (-np.arange(64) / 64)
    ratio = plain / np.asarray(frequencies(a), np.float64)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8, rtol=1e-5)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) > 3 and ((between > 1) & (between < 8)).all()


def test_a_local_layer_sees_the_last_tokens_of_its_own_conversation():
    """A prefix of 4 with two branches of 3: the second branch sees back into the prefix, by positions, not columns."""
    a = Architecture(num_layers=2, pattern="LG", window=3)
    segment = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
    seen = visibility(a, segment, jnp.array([[0, 0, 1, 1]]), positions)
    seen = {local: written_out(each) for local, each in seen.items()}
    assert [set(np.flatnonzero(seen[True][0, column])) for column in (3, 4, 7, 9)] == [
        {1, 2, 3}, {2, 3, 4}, {2, 3, 7}, {7, 8, 9},
    ]  # fmt: skip
    assert set(np.flatnonzero(seen[False][0, 9])) == {0, 1, 2, 3, 7, 8, 9}
