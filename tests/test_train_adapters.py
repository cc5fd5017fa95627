"""Whole trainings of which a part learns: what stays stays bit by bit, and a session that ends changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.convert import read_run
from rlrag.model.architecture import Adapters
from rlrag.model.parameters import initialize
from rlrag.train import train
from tests.experiments import tiny
from tests.test_train import interrupted, rows_of, without_times


def adapted():
    """A base of bytes and bfloat16, adapters with dropout, the base as reference, newest rows that learn."""
    experiment = tiny()
    experiment.model.base, experiment.model.param_dtype = "int8", "bfloat16"
    experiment.model.adapters = Adapters(rank=2, dropout=0.25, rows=5)
    experiment.main.loss.kl, experiment.main.loss.reference = 0.1, "base"
    return experiment


def narrow():
    """Parameters in bfloat16, their originals in float32; steps that bfloat16 alone would round away."""
    experiment = tiny()
    experiment.model.param_dtype, experiment.steps = "bfloat16", 0
    experiment.warm_up.update.learning_rate = 1e-5
    return experiment


def chosen():
    """Two parts that are named by their paths."""
    experiment = tiny()
    experiment.steps = 0
    experiment.warm_up.update.trains = experiment.main.update.trains = "layers.query,final_norm"
    return experiment


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in found}


LEARNS = {adapted: ("adapters.",), narrow: ("",), chosen: ("layers.query", "final_norm")}  # how their paths begin


@pytest.mark.parametrize("build", [adapted, narrow, chosen])
def test_what_learns_moves_the_rest_stays_and_a_resume_is_exact(build, tmp_path, monkeypatch):
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    experiment = build()
    experiment.checkpoint_every = 1
    result = train(experiment, alone)
    interrupted(monkeypatch, experiment, broken, learn=7 if experiment.steps else 3)  # the third of the last stage
    again = train(experiment, broken)
    assert again["weights_sha256"] == result["weights_sha256"]
    assert without_times(rows_of(broken)) == without_times(rows_of(alone))
    assert (broken / "episodes.jsonl").read_text() == (alone / "episodes.jsonl").read_text()

    a, params = read_run(alone, "policy", False)
    begun = jax.jit(lambda key: initialize(a, key))(jax.random.fold_in(jax.random.key(experiment.seed), 0))
    before, after = leaves(begun), leaves(params)
    assert before.keys() == after.keys()
    for place in before:
        moved = (before[place] != after[place]).any()
        if not place.startswith(LEARNS[build]):
            assert not moved, f"{place} has stayed"
        elif build is not narrow:  # some of whose small steps end where they began
            assert moved, f"{place} has learned"
    if build is adapted:
        assert after["layers.query.values"].dtype == np.int8
        assert after["final_norm"].dtype == jnp.bfloat16
        assert {after[place].dtype for place in after if place.startswith("adapters.")} == {np.dtype("float32")}
        assert len(after["adapters.rows"]) == 5
    if build is narrow:
        assert {leaf.dtype for leaf in after.values()} == {jnp.dtype("bfloat16")}
        assert sum((before[place] != after[place]).mean() for place in after) > 0.1, "steps have added up"
