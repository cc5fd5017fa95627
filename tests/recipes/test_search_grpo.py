import numpy as np
import pytest

from rlrag.data.task import open_task
from rlrag.recipes import search_grpo
from rlrag.trajectory import Example, Group, Outcome, Stream, Trajectory
from tests.experiments import tiny


@pytest.fixture(scope="module")
def task():
    return open_task(tiny())


def test_warm_up_then_grpo(task):
    experiment = tiny()
    experiment.main.loss.kl, experiment.main.loss.old_logp = 0.01, "recompute"
    warm_up, main = search_grpo.build(experiment, task)
    assert (warm_up.name, warm_up.steps, warm_up.settings) == ("warm_up", experiment.warm_up.steps, experiment.warm_up)
    assert (main.name, main.steps, main.settings) == ("main", experiment.steps, experiment.main)
    assert warm_up.demonstrate is task.demonstrate
    assert main.demonstrate is None
    objective = main.recipe.learn["policy"].objective
    assert (objective.needs, objective.recompute_old) == ({"old_logp", "ref_logp"}, True)
    assert not warm_up.recipe.learn["policy"].objective.needs
    plain = search_grpo.build(tiny(), task)[1].recipe.learn["policy"].objective
    assert (plain.needs, plain.recompute_old) == ({"old_logp"}, False)


def test_the_supervised_baseline_differs_in_the_main_stage_alone(task):
    experiment = tiny()
    (warm_up, main), (first, _) = (
        build(experiment, task) for build in (search_grpo.build_supervised, search_grpo.build)
    )
    assert (warm_up.steps, warm_up.settings) == (first.steps, first.settings)
    assert (main.name, main.steps, main.settings) == ("main", experiment.steps, experiment.main)
    assert main.demonstrate is task.demonstrate
    assert not main.recipe.learn["policy"].objective.needs


def test_sampling_comes_from_the_rollout(task):
    experiment = tiny()
    experiment.rollout.train.temperature, experiment.rollout.train.top_p = 0.7, 0.9
    experiment.rollout.evaluate.top_k = 5
    role = search_grpo.recipe(experiment, task).roles["agent"]
    assert (role.model, role.train.temperature, role.train.top_p) == ("policy", 0.7, 0.9)
    assert (role.evaluate.temperature, role.evaluate.top_k) == (0.0, 5)


def paid(experiment, task, answer, blocks=()):
    example = Example("q", "who?", ("new york",))
    trajectory = Trajectory(
        example, streams=[Stream("agent", "agent")], outcome=Outcome(answer, {"blocks": list(blocks)})
    )
    recipe = search_grpo.recipe(experiment, task)
    (payment,) = recipe.reward(Group(example, [trajectory]))
    amounts = {name: payment.per_call[name][0] for name in recipe.rewards if name in payment.per_call}
    return recipe.rewards, amounts, payment.metrics


WELL_FORMED = (("search", "model"), ("information", "environment"), ("answer", "model"))


@pytest.mark.parametrize(("metric", "amount"), [("em", 0.0), ("f1", 2 / 3), ("contains", 0.0)])
def test_the_metric_that_pays(task, metric, amount):
    experiment = tiny()
    experiment.reward.metric = metric
    names, amounts, metrics = paid(experiment, task, "york")
    assert names == ("answer",)
    assert amounts == {"answer": pytest.approx(amount)}
    assert metrics["f1"] == pytest.approx(2 / 3)


def test_the_format_has_a_price(task):
    experiment = tiny()
    experiment.reward.format = 0.25
    assert paid(experiment, task, "New York", WELL_FORMED)[:2] == (
        ("answer", "format"), {"answer": 1.0, "format": 0.25},
    )  # fmt: skip
    assert paid(experiment, task, "Oslo", WELL_FORMED)[1] == {"answer": 0.0, "format": 0.25}
    _, amounts, metrics = paid(experiment, task, "New York", WELL_FORMED[1:])
    assert amounts == {"answer": 1.0, "format": 0.0}
    assert metrics["em"] == 1.0


def test_the_rule_of_search_r1(task):
    experiment = tiny()
    experiment.reward.metric = "search_r1"
    thinking = (("think", "model"), *WELL_FORMED[:2], ("think", "model"), WELL_FORMED[2])
    assert paid(experiment, task, "New York", thinking)[:2] == (("score",), {"score": 1.0})
    _, amounts, metrics = paid(experiment, task, "New York")
    assert amounts == {"score": 0.8}
    assert metrics["em"] == 1.0
    experiment.reward.format = 0.1
    with pytest.raises(ValueError, match=r"reward.format is 0.1: reward.metric=search_r1 has its own"):
        paid(experiment, task, "New York")


def test_a_reward_that_is_none(task):
    experiment = tiny()
    experiment.reward.metric = "accuracy"
    with pytest.raises(ValueError, match="'accuracy': give one of em, f1, contains"):
        search_grpo.recipe(experiment, task)
    experiment = tiny()
    experiment.main.loss.clip_low = np.inf
    with pytest.raises(ValueError, match="clip_low is inf"):
        search_grpo.build(experiment, task)
