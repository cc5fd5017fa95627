import jax
import pytest

from configs import algorithms
from rlrag.dry_run import describe, dry_run
from rlrag.learner import Learner
from rlrag.mesh import make_mesh
from rlrag.model.parameters import initialize
from rlrag.recipes.recipe import POLICY
from rlrag.setup import build_architecture, build_stages
from tests.experiments import tiny


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_what_is_planned_is_what_a_learner_holds(tmp_path):
    """Parameters, references and optimizer states, of policy and critic, byte by byte."""
    from rlrag.data.task import open_task

    experiment = tiny()
    algorithms.ppo(experiment.main, experiment)
    experiment.main.loss.kl = 0.1
    warm_up, main = dry_run(experiment, tmp_path)
    assert (warm_up.stage, main.stage) == ("warm_up", "main")
    task = open_task(experiment)
    a = build_architecture(experiment, task)
    models = {POLICY: initialize(a, jax.random.key(0))}
    learner = Learner(build_stages(experiment, task)[1], a, make_mesh(), 0, models)
    assert main.parts["weights"] == nbytes(learner.models)
    assert main.parts["references"] == nbytes(learner.references)
    assert main.parts["optimizer"] == nbytes([state.opt_state for state in learner.states.values()])
    assert main.parameters["critic"] == main.parameters[POLICY] + a.embed_dim
    assert set(main.temporary) == {
        "prepare", "accumulate policy", "accumulate critic", "apply policy", "apply critic", "pack", "advance",
    }  # fmt: skip
    assert warm_up.parts["references"] == 0
    assert main.peak > sum(main.parts.values())
    shown = describe([warm_up, main])
    assert "peak a device" in shown
    assert "tokens a step" in shown
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_cannot_work_is_told_without_compiling(tmp_path):
    experiment = tiny()
    experiment.main.update.row_tokens = 40
    with pytest.raises(ValueError, match=r"main.update.row_tokens is 40"):
        dry_run(experiment, tmp_path)
    experiment = tiny()
    experiment.rollout.num_pages = 3
    with pytest.raises(ValueError, match=r"rollout.num_pages is 3"):
        dry_run(experiment, tmp_path)
