"""Scores of packed rows against each stream alone, softmax in float64."""

import jax
import numpy as np
import pytest

from rlrag.mesh import make_mesh
from rlrag.model.transformer import trunk
from rlrag.objectives.scoring import no_scores, placement, score
from tests.episodes import make_groups, pack_groups
from tests.objectives.learner import ARCHITECTURE, parameters


@pytest.fixture(scope="module")
def forward():
    return jax.jit(lambda params, *inputs: trunk(params, ARCHITECTURE, *inputs))


def test_scores_are_those_of_each_stream_alone(forward):
    """log p at the temperature sampled at, within the set sampled from; entropy and certainty of the whole."""
    params = parameters()
    head = np.asarray(params.output_head, np.float64)
    groups = make_groups(7, 3, 3)
    packed = pack_groups(groups, max_micro=1, rows=12)
    batch = jax.tree.map(lambda leaf: leaf[0], packed.batch)
    scores = jax.jit(lambda p, b: score(p, ARCHITECTURE, b))(params, batch)
    streams = [t.streams for group in groups for t in group.trajectories]
    seen = {"filtered": 0, "whole": 0, "greedy": 0, "tempered": 0}
    for place in packed.places:
        stream = streams[place.episode][place.call]
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : stream.num_tokens] = stream.tokens
        segment = (np.arange(96) < stream.num_tokens).astype(np.int32)[None]
        hidden = forward(params, tokens, np.arange(96)[None], segment, np.zeros((1, 2), np.int32))
        logits = np.asarray(hidden, np.float64)[0] @ head.T
        at = 0
        for span in stream.spans:
            for i, token in enumerate(span.tokens if span.act else ()):
                z = logits[at + i - 1] / (span.temperature or 1.0)
                p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                inside = span.kept[i] if span.kept is not None else np.arange(len(z))
                cell = (place.row, place.column + at + i - place.start)
                assert int(batch.tokens[cell]) == token
                assert float(scores.logp[cell]) == pytest.approx(z[token] - np.log(np.exp(z[inside]).sum()), abs=2e-5)
                assert float(scores.entropy[cell]) == pytest.approx(-(p * np.log(p)).sum(), abs=2e-5)
                certainty = (np.log(1 / len(p)) - np.log(p)).mean()
                assert float(scores.certainty[cell]) == pytest.approx(certainty, abs=2e-5)
                seen["filtered" if span.kept is not None else "whole"] += 1
                seen["greedy" if span.temperature == 0 else "tempered"] += 1
            at += len(span.tokens)
    assert min(seen.values()) > 10, seen
    assert all(np.isfinite(leaf).all() for leaf in scores), "padding included"


def test_stand_ins_have_the_shape_of_scores():
    batch = jax.tree.map(lambda leaf: leaf[0], pack_groups(make_groups(7)).batch)
    shapes = jax.eval_shape(lambda p, b: score(p, ARCHITECTURE, b), parameters(), batch)
    for real, stand_in in zip(shapes, no_scores(batch), strict=True):
        assert (real.shape, real.dtype) == (stand_in.shape, stand_in.dtype)


def print_placements() -> None:
    print(placement())
    for mesh in (make_mesh(4, 2), make_mesh(2, 2, replica=2)):
        with jax.set_mesh(mesh):
            found = placement()
            print(found.rows, found.vocabulary, *(found.local(8, vocabulary) for vocabulary in (24, 25)))


def test_logits_lie_over_rows_and_over_a_vocabulary_that_divides(run_on_devices):
    assert placement() is None
    assert run_on_devices(print_placements).splitlines() == [
        "None",
        "('data',) model (2, 12) (2, 25)",
        "('replica', 'data') model (2, 12) (2, 25)",
    ]
