from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import algorithms
from rlrag import dry_run as planning
from rlrag.config import Mesh
from rlrag.dry_run import describe, dry_run, open_settings, settle
from rlrag.learner import Learner
from rlrag.mesh import make_mesh
from rlrag.model.parameters import initialize
from rlrag.recipes.recipe import POLICY
from rlrag.setup import build_architecture, build_stages
from rlrag.speed.machine import COMPILING
from tests.experiments import tiny
from tests.test_learner import collected


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


@pytest.fixture
def compiled():
    """Names of what is compiled, as it is."""
    names = []

    def note(event: str, duration_secs: float, **told) -> None:
        if event == COMPILING:
            names.append(told["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_as_little_is_computed_again_as_there_is_room_for(tmp_path, monkeypatch, compiled, capsys):
    """And the program that was found to fit is the one that runs; what is learned is the same."""
    experiment = tiny()
    experiment.mesh, experiment.warm_up.steps = Mesh(1, 1), 0
    experiment.model = replace(experiment.model, num_layers=4, embed_dim=32, mlp_dim=128, remat="auto")
    experiment.main.update.row_tokens = 256
    learned, told = [], []
    for memory, tried in ((2**40, 1), (1, 3)):
        monkeypatch.setattr(planning, "memory_bytes", lambda memory=memory: memory)
        with open_settings(experiment, tmp_path, jax.devices()[:1]) as (setting,):
            settled, programs = settle(setting)
            told.append((settled.a.remat, capsys.readouterr().out.strip()))
            assert sum("accumulate" in name for name in compiled) == tried
            models = {POLICY: initialize(settled.a, jax.random.key(0))}
            learner = Learner(setting.stage, settled.a, setting.mesh, 0, models, programs=programs)
            compiled.clear()
            learner.learn(collected(), 0)
        assert any("apply" in name for name in compiled)
        assert not any("accumulate" in name for name in compiled)
        learned.append(jax.tree.leaves(jax.device_get(learner.models)))
        compiled.clear()
    (most, roomy), (least, narrow) = told
    assert (most, least) == ("", "all")
    assert roomy.startswith("main: model.remat is '', 943,718.4 MiB a device may be filled; recomputing nothing ")
    assert narrow.endswith("; make main.update.micro_rows smaller")
    sizes = [
        float(part.split()[-2].replace(",", "")) for part in narrow.split("recomputing ")[1].split(";")[0].split(", ")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for one, other in zip(*learned, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
