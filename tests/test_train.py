import json
import os
import shutil
from pathlib import Path

import pytest

from rlrag import train as loop
from rlrag.config import to_dict
from rlrag.learner import Learner
from rlrag.train import train
from tests.experiments import taught, tiny

TIMES = (
    "_s",
    "seconds",
    "tokens_per_s",
    "occupancy",
    "waste",
    "rounds",
    "per_batch",
    "prefill_tokens",
    "shared_tokens",
)


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    """What does not depend on the machine's speed, nor on when a search came back."""
    counted = "rollout/retriever/"  # how requests were cut, and what a cache still knew
    return [{k: v for k, v in row.items() if not k.endswith(TIMES) and not k.startswith(counted)} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run from start to end, and its result."""
    directory = tmp_path_factory.mktemp("finished") / "runs" / "tiny"
    return directory, train(tiny(), directory)


class Stopped(Exception):
    """What ends a session in these tests, in place of a kill."""


def interrupted(monkeypatch, experiment, directory, *, learn: int | None = None, score: str | None = None):
    """A session that ends as it begins the learn-th batch of this session, or as it begins to test `score`."""
    with monkeypatch.context() as patch:
        if learn is not None:
            real, calls = Learner.learn, []

            def stop(self, collected, step):
                calls.append(step)
                if len(calls) == learn:
                    raise Stopped
                return real(self, collected, step)

            patch.setattr(Learner, "learn", stop)
        real_score = loop.score

        def stop_score(run, params, name):
            if name == score:
                raise Stopped
            return real_score(run, params, name)

        patch.setattr(loop, "score", stop_score)
        with pytest.raises(Stopped):
            train(experiment, directory)


def test_what_a_run_leaves(finished):
    directory, result = finished
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "curve.png", "result.json",
        "predictions_warm_start.jsonl", "predictions_final.jsonl", "best", "alarms.jsonl", "episodes.jsonl",
    }  # fmt: skip
    assert json.loads((directory / "result.json").read_text()) == result
    assert set(result) == {
        "warm_start", "final", "best", "oracle", "random", "seconds", "tokens", "weights_sha256", "device", "versions",
        "config",
    }  # fmt: skip
    assert set(result["warm_start"]) == set(result["final"]) >= {"em", "em_interval", "f1", "f1_interval", "searches"}
    assert result["oracle"]["em"] == 1.0
    assert result["random"]["em"] <= 0.2
    assert result["config"] == to_dict(tiny()) == json.loads((directory / "config.json").read_text())
    assert len(result["weights_sha256"]) == 64
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    predictions = [json.loads(line) for line in (directory / "predictions_final.jsonl").read_text().splitlines()]
    assert len(predictions) == result["final"]["questions"] == 8
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["6", "8"]


def test_metrics_have_a_row_for_every_step(finished):
    directory, result = finished
    rows = rows_of(directory)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in ("warm_up", "main") for n in (1, 2, 3, 4)]
    assert sum(row["trained_tokens"] for row in rows) == result["tokens"]
    main = rows[4:]
    for row in main:
        assert row["clip_fraction"] == 0.0, "one update a batch is on-policy"
        assert row["sampler_learner_gap_max"] < 1e-4
        assert row["rollout/tokens_per_s"] > 0
        assert {"reward", "em", "grad_norm", "learning_rate", "skipped", "update_s"} <= set(row)
    assert ["validation/em" in row for row in main] == [False, True, False, True]
    assert any((directory / "tensorboard").iterdir())


def test_a_finished_run_is_told_and_left_alone(finished, monkeypatch, capsys):
    directory, result = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    monkeypatch.setattr(loop, "set_up", None)  # nothing is set up
    assert train(tiny(), directory) == result
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    shown = capsys.readouterr().out
    assert "holds this run, finished: choose another --workdir" in shown
    assert "oracle 1.000, random" in shown


def test_another_configuration_is_told(finished):
    directory, _ = finished
    experiment = tiny()
    experiment.main.update.learning_rate, experiment.steps = 0.5, 9
    with pytest.raises(
        ValueError, match=r"main.update.learning_rate is 0.001 there and 0.5 now; steps is 4 there and 9"
    ):
        train(experiment, directory)


def test_a_run_that_failed_at_its_start_binds_nobody(tmp_path):
    experiment = tiny()
    experiment.main.update.row_tokens = 40
    with pytest.raises(ValueError, match=r"main.update.row_tokens is 40, but episodes have up to 93 tokens"):
        train(experiment, tmp_path)
    experiment = tiny()
    experiment.mesh.data = 7
    with pytest.raises(ValueError, match="mesh data=7"):
        train(experiment, tmp_path)
    assert not (tmp_path / "result.json").exists()


def one_step_off():
    experiment = tiny()
    experiment.main.one_step_off, experiment.checkpoint_every = True, 1
    return experiment


def two_models():
    experiment = tiny()
    experiment.main.credit.kind, experiment.main.loss.critic = "gae", "separate"
    experiment.main.loss.kl, experiment.main.loss.kl_target = 0.01, 0.001
    experiment.checkpoint_every = 1
    return experiment


@pytest.mark.parametrize("build", [one_step_off, two_models])
def test_interrupted_runs_of_other_kinds_end_the_same(build, tmp_path, monkeypatch):
    """One step off-policy a batch is in flight; with two models and a coefficient that adapts there is more to keep."""
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    result = train(build(), alone)
    interrupted(monkeypatch, build(), broken, learn=7)  # the third of the main stage
    again = train(build(), broken)
    assert again["weights_sha256"] == result["weights_sha256"]
    assert without_times(rows_of(broken)) == without_times(rows_of(alone))
    assert [row["staleness"] for row in rows_of(alone)[4:]] == [0.0, *[float(build is one_step_off)] * 3]
    assert (broken / "episodes.jsonl").read_text() == (alone / "episodes.jsonl").read_text()


def test_a_warm_start_takes_the_place_of_the_warm_up(finished, tmp_path):
    """It draws what the run with the warm-up draws, and ends the same."""
    directory, result = finished
    first, second = tiny(), tiny()
    first.steps = 0
    train(first, tmp_path / "start")
    second.warm_start = str(tmp_path / "start")
    found = train(second, tmp_path / "run")
    assert found["weights_sha256"] == result["weights_sha256"]
    assert found["warm_start"] == result["warm_start"]
    assert (found["oracle"], found["random"]) == (result["oracle"], result["random"])
    assert without_times(rows_of(tmp_path / "run")) == without_times(rows_of(directory)[4:])
    second.warm_start = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"warm_start is .*nowhere, which holds no finished run"):
        train(second, tmp_path / "other")


def continued(directory):
    experiment = tiny()
    experiment.mesh.data = -1
    print(json.dumps(train(experiment, directory)["final"]))


def on_two_devices():
    continued(Path(os.environ["RLRAG_TEST_RUN"]))


def test_another_number_of_devices_goes_on_with_it(finished, tmp_path, monkeypatch, run_on_devices):
    interrupted(monkeypatch, tiny(), tmp_path, learn=6)
    monkeypatch.setenv("RLRAG_TEST_RUN", str(tmp_path))
    out = run_on_devices(on_two_devices, 2)
    assert "going on from step 4 of stage warm_up" in out or "going on from step" in out
    wanted, found = rows_of(finished[0])[-1], rows_of(tmp_path)[-1]
    assert (found["stage"], found["step"]) == ("main", 4)
    assert found["entropy"] == pytest.approx(wanted["entropy"], rel=1e-4)


def test_killed_everywhere_it_ends_the_same(finished, tmp_path, monkeypatch):
    directory, result = finished
    interrupted(monkeypatch, tiny(), tmp_path, learn=2)  # before anything is saved
    assert len(rows_of(tmp_path)) == 1
    interrupted(monkeypatch, tiny(), tmp_path, learn=4)  # in the warm-up, behind its first checkpoint
    interrupted(monkeypatch, tiny(), tmp_path, score="warm_start")  # behind the warm-up, before its test
    interrupted(monkeypatch, tiny(), tmp_path, learn=4)  # in the main stage
    interrupted(monkeypatch, tiny(), tmp_path, score="final")  # behind the last checkpoint
    assert not (tmp_path / "result.json").exists()
    again = train(tiny(), tmp_path)
    assert again["weights_sha256"] == result["weights_sha256"]
    assert again["warm_start"] == result["warm_start"]
    assert again["final"] == result["final"]
    assert again["tokens"] == result["tokens"]
    assert without_times(rows_of(tmp_path)) == without_times(rows_of(directory))


def test_equal_seeds_are_equal_while_searches_return_when_they_will(tmp_path):
    """The policy searches on host threads here, so the order in which episodes go on differs from run to run."""
    first = train(taught(), tmp_path / "first")
    assert rows_of(tmp_path / "first")[-1]["searches"] > 0.3
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "second" / "result.json").unlink()
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "104")  # as it was when the warm-up ended
    second = train(taught(), tmp_path / "second")
    assert second["weights_sha256"] == first["weights_sha256"]
    assert without_times(rows_of(tmp_path / "second")) == without_times(rows_of(tmp_path / "first"))
    predictions = [(tmp_path / name / "predictions_final.jsonl").read_text() for name in ("first", "second")]
    assert predictions[0] == predictions[1]


def test_another_seed_is_another_run(finished, tmp_path):
    experiment = tiny()
    experiment.seed, experiment.steps, experiment.warm_up.steps = 1, 0, 0  # the initial weights
    result = train(experiment, tmp_path)
    assert result["weights_sha256"] != finished[1]["weights_sha256"]
    assert result["warm_start"]["em"] == result["final"]["em"]


def test_a_stage_that_reached_its_aim_stays_ended(tmp_path, monkeypatch):
    experiment = tiny()
    experiment.warm_up.until_metric, experiment.warm_up.evaluate_every = "em", 3  # at least 0: reached at once
    interrupted(monkeypatch, experiment, tmp_path, score="warm_start")
    result = train(experiment, tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 1, 2, 3, 4]
    assert result["final"]["questions"] == 8
