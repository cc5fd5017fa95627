"""Padded rows are scored as others score them, and give the gradient that packed ones give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from rlrag.model.architecture import Architecture
from rlrag.objectives.scoring import score
from rlrag.speed import comparisons, padded, update
from rlrag.speed.rollout import start
from rlrag.speed.update import ALL, MODEL, Pupil, RowSizes
from rlrag.speed.workload import Workload

A = Architecture(
    vocab_size=128, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, qkv_bias=True,
    scan_unroll=2,
)  # fmt: skip
PROMPT = 40
LEARN = Workload(A.vocab_size, prompt_tokens=PROMPT, turns=(2, 2), turn_tokens=(12, 12), document_tokens=(20, 20))
LONGEST, STREAMS = PROMPT + 2 * 12 + 20, 2 * 4
SCORES = {"packed": score, "padded": partial(padded.score, PROMPT), "padded, our kernels": score}


@pytest.fixture(scope="module")
def learners():
    sizes = dict.fromkeys(SCORES, padded.sizes(STREAMS, LONGEST, 2 * LONGEST)) | {"packed": RowSizes(1, 256)}
    groups = LEARN.groups(2, 4)
    return {
        name: (update.packed(groups, sizes[name], ALL), Pupil(A, start(A), ALL, STREAMS, 2, scoring))
        for name, scoring in SCORES.items()
    }


def test_micro_batches_are_filled_to_the_last():
    assert padded.sizes(64, 768, 5376) == RowSizes(8, 768, 2)
    assert padded.sizes(6, 100, 420) == RowSizes(3, 100, 2)
    assert padded.sizes(3, 100, 10) == RowSizes(1, 100, 2)


def test_scores_are_those_of_the_learner_by_dense_attention(learners):
    made, pupil = learners["padded"]
    micro = jax.tree.map(lambda leaf: leaf[0], made.batch)
    mine, ours = (jax.jit(each, static_argnums=1)(pupil.parameters, A, micro) for each in (SCORES["padded"], score))
    for name in ("logp", "entropy", "certainty"):
        np.testing.assert_allclose(getattr(mine, name), getattr(ours, name), atol=2e-6)
    text = jax.jit(SCORES["padded"], static_argnums=1).lower(pupil.parameters, A, micro).as_text()
    assert f"tensor<{2 * (LONGEST - PROMPT)}x{A.vocab_size}xf32>" in text  # logits of every column behind the prompt
    assert dispatch.chosen()["packed_attention"] == "reference"


def test_every_way_has_the_gradient_that_float64_has(learners):
    """Ways differ by the order of their sums: as far as float32 is from the truth, and no way farther than others."""
    gradients = {name: pupil.gradient(made) for name, (made, pupil) in learners.items()}
    made, pupil = learners["padded"]
    prepared = pupil._prepared(made, pupil.update.put(made.batch)).batches[MODEL]
    names = ("tokens", "act", "weight", "old_logp")
    rows = {name: np.asarray(getattr(prepared, name)).reshape(-1, LONGEST) for name in names}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), pupil.parameters)
        truth = jax.device_get(jax.jit(jax.grad(loss))(params, rows))
    errors = {name: comparisons.apart(gradient, truth) for name, gradient in gradients.items()}
    assert max(errors.values()) < min(2e-6, 1.5 * min(errors.values())), errors
    for name, gradient in gradients.items():
        assert comparisons.apart(gradient, gradients["packed"]) < 1e-6, name
        assert comparisons.farthest(gradient, gradients["packed"]) < 1e-6, name


def loss(p, rows):
    """The clipped surrogate of whole rows, of which each is one stream, in the precision of p."""
    x, positions = p.embed[rows["tokens"]], np.arange(LONGEST)
    angle = positions[:, None, None] * A.rope_theta ** (-np.arange(A.head_dim // 2) / (A.head_dim // 2))

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + A.norm_epsilon) * scale

    def heads(x, weight, bias):
        return (x @ weight + bias).reshape(*x.shape[:2], -1, A.head_dim)

    def turned(x):
        first, second = jnp.split(x, 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    for number in range(A.num_layers):
        w = jax.tree.map(lambda leaf: leaf[number], p.layers)  # noqa: B023
        y = norm(x, w.attention_norm)
        q, k = turned(heads(y, w.query, w.query_bias)), turned(heads(y, w.key, w.key_bias))
        v, group = heads(y, w.value, w.value_bias), A.num_heads // A.num_kv_heads
        k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) * A.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(positions[:, None] >= positions, scores, -jnp.inf), -1)
        x = x + jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(*x.shape[:2], -1) @ w.output
        y = norm(x, w.mlp_norm)
        x = x + (jax.nn.silu(y @ w.gate) * (y @ w.up)) @ w.down
    log_p = jax.nn.log_softmax(norm(x, p.final_norm)[:, :-1] @ p.embed.T)
    logp = jnp.take_along_axis(log_p, rows["tokens"][:, 1:, None], -1)[..., 0]
    ratio = jnp.exp(logp - rows["old_logp"][:, 1:].astype(logp.dtype))
    gain = jnp.minimum(ratio * rows["weight"][:, 1:], jnp.clip(ratio, 0.8, 1.2) * rows["weight"][:, 1:])
    trained = rows["act"][:, 1:] > 0
    return -jnp.sum(jnp.where(trained, gain, 0)) / jnp.sum(trained)
