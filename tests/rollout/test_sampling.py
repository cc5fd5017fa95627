"""Sampling against the inverse CDF in float64, and filters against the logits processors of transformers in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rlrag.rollout.sampling import BLOCK, Controls, draw, first_above, keep, sample

K = 8


def controls(temperature, top_k, top_p, allowed=None) -> Controls:
    B = len(temperature)
    rows = np.full((B, K), -1, np.int32)
    for row, ids in enumerate(allowed or [()] * B):
        rows[row, : len(ids)] = ids
    return Controls(np.float32(temperature), np.int32(top_k), np.float32(top_p), rows)


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 1000])
def test_draw_is_the_inverse_cdf(vocabulary):
    dice = np.random.default_rng(vocabulary)
    logits = dice.normal(scale=3, size=(4000, vocabulary)).astype(np.float32)
    uniform = dice.random(4000, np.float32)
    drawn = np.asarray(jax.jit(draw)(logits, uniform))
    p = np.exp(logits.astype(np.float64))
    cumulative = np.cumsum(p / p.sum(-1, keepdims=True), -1)
    wanted = np.minimum((cumulative <= uniform[:, None]).sum(-1), vocabulary - 1)
    # In float32 a number within rounding of a border may fall to either side.
    border = np.abs(cumulative - uniform[:, None]).min(-1) < 2e-6
    assert ((drawn == wanted) | border).all()
    assert border.mean() < 0.02


def test_draws_are_distributed_as_the_softmax():
    logits = np.random.default_rng(0).normal(scale=1.5, size=200).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(1), (50_000,))
    drawn = jax.jit(lambda u: draw(jnp.broadcast_to(logits, (len(u), 200)), u))(uniform)
    p = np.exp(logits.astype(np.float64))
    expected = 50_000 * p / p.sum()
    counts = np.bincount(drawn, minlength=200)
    common = expected > 5
    merged = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert chisquare(*merged).pvalue > 1e-3


def test_tokens_of_weight_zero_are_never_drawn():
    """Also at the ends of the unit interval, and where a block's first tokens are impossible."""
    dice = np.random.default_rng(0)
    logits = np.where(dice.random((3000, 300)) < 0.8, -np.inf, dice.normal(size=(3000, 300))).astype(np.float32)
    logits[:, 0] = logits[:, -1] = -np.inf
    p = np.exp(logits)
    borders = np.cumsum(p.reshape(3000, -1, 60).sum(-1), -1) / p.sum(-1, keepdims=True)
    blocks = np.cumsum(np.pad(p, ((0, 0), (0, 20))).reshape(3000, -1, BLOCK).sum(-1, dtype=np.float32), -1)
    at_border = (blocks[:, 1] / blocks[:, -1]).astype(np.float32)  # exactly between two blocks, give or take a rounding
    for uniform in (
        np.zeros(3000),
        np.full(3000, np.float32(1 - 2**-24)),
        at_border,
        np.nextafter(at_border, 1),
        borders[:, 2],
    ):
        drawn = np.asarray(jax.jit(draw)(logits, np.float32(uniform)))
        assert (p[np.arange(3000), drawn] > 0).all()


@pytest.mark.parametrize("fraction", [-1e-7, 0.0, 0.5, 1.0, 1.5])
def test_rounding_past_an_end_stays_inside(fraction):
    weights = jnp.array([[0.0, 0.0, 2.0, 0.0, 1.0, 0.0]])
    index, before = first_above(weights, jnp.array([fraction]))
    assert int(index[0]) == (2 if fraction <= 0.5 else 4)
    assert float(before[0]) == (0.0 if fraction <= 0.5 else 2.0)


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
    ids, values = map(np.asarray, jax.jit(keep)(logits, controls(temperature, top_k, top_p, allowed)))
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
    c = Controls(jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros((2, 0), jnp.int32))
    tokens, kept = jax.jit(sample)(jnp.zeros((2, 9)), jnp.array([0.0, 0.99]), c)
    assert tokens.tolist() == [0, 8]
    assert kept.shape == (2, 0)


def test_everything_filtered_but_one():
    c = controls([1.0, 1.0, 1.0], [1, 0, 0], [1.0, 1e-6, 1.0], [(), (), (7,)])
    logits = np.random.default_rng(6).normal(size=(3, 20)).astype(np.float32)
    for uniform in (0.0, 0.999999):
        tokens, _ = jax.jit(sample)(logits, np.full(3, uniform, np.float32), c)
        assert tokens.tolist() == [int(logits[0].argmax()), int(logits[1].argmax()), 7]


@partial(jax.jit, static_argnums=0)
def uniforms(count: int, root: jax.Array) -> jax.Array:
    """As `advance` draws them: one number for each (stream, position)."""
    streams, positions = jnp.arange(count, dtype=jnp.uint32), jnp.arange(100)
    keys = jax.vmap(partial(jax.random.fold_in, root))(streams)
    return jax.vmap(lambda key: jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(positions))(keys)


def test_uniforms_of_streams_and_positions_are_independent():
    u = np.asarray(uniforms(300, jax.random.key(0)))
    assert len(np.unique(u)) > 0.99 * u.size
    counts, _ = np.histogram(u, 50, (0, 1))
    assert chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
