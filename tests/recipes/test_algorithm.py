import pytest

from configs import algorithms
from rlrag import config
from rlrag.data.task import open_task
from rlrag.objectives.coefficients import Coefficient
from rlrag.recipes.algorithm import CRITIC, rewards_differ
from rlrag.recipes.recipe import POLICY
from rlrag.recipes.search_grpo import build
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Example, Group
from tests.experiments import tiny


@pytest.fixture(scope="module")
def task():
    return open_task(tiny())


def main_recipe(task, change):
    experiment = tiny()
    change(experiment.main, experiment)
    config.check(experiment)
    return build(experiment, task)[1].recipe


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_is_built_from_its_lines(task, name):
    config.check(algorithms.get_config(name))
    recipe = main_recipe(task, algorithms.ALGORITHMS[name])
    objective = recipe.learn[POLICY].objective
    assert set(recipe.learn) == ({POLICY, CRITIC} if name == "ppo" else {POLICY})
    assert ("ref_logp" in objective.needs) == ("kl" in name or name in ("rloo",) or name.startswith("reinforce"))
    assert ("value" in objective.needs) == (name == "ppo_trunk")
    assert objective.recompute_old == ("importance" in name)


def test_a_separate_critic_reads_the_policys_batch_with_its_own_optimizer(task):
    learn = main_recipe(task, algorithms.ppo).learn[CRITIC]
    assert learn.reads == POLICY
    assert learn.objective.needs == {"value"}
    assert learn.optimizer is not None
    assert learn.optimizer.learning_rate == 1e-3


def test_coefficients_of_an_algorithm(task):
    assert main_recipe(task, algorithms.grpo).coefficients == {}
    assert main_recipe(task, algorithms.grpo_kl_adaptive).coefficients == {"kl": Coefficient(1e-2, "kl", 0.05, 2000)}
    assert main_recipe(task, algorithms.rloo).coefficients == {"kl_reward": Coefficient(1e-3, "kl_reward", 0.0, 10_000)}
    assert main_recipe(task, algorithms.ppo_trunk).coefficients == {"value": Coefficient(0.1)}
    assert main_recipe(task, algorithms.grpo_entropy).coefficients == {"entropy": Coefficient(1e-3)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"credit.kind": "gae"}, "main.credit.kind is 'gae' and main.loss.critic '': gae needs a critic"),
        ({"loss.critic": "trunk"}, "main.credit.kind is 'group' and main.loss.critic 'trunk'"),
        ({"loss.dual_clip": 0.5}, "main.loss.dual_clip is 0.5: give more than 1"),
        ({"loss.kl_target": 0.1}, "main.loss.kl_target is 0.1: give a loss.kl or credit.kl_reward"),
        ({"loss.importance": "token"}, "give --config.main.loss.old_logp=recompute"),
        ({"credit.kind": "grop"}, "main.credit.kind is 'grop': choose 'group' or"),
        ({"dynamic_sampling": 2, "group_size": 1}, "main.dynamic_sampling is 2, but groups have one member"),
    ],
)
def test_parts_that_do_not_go_together_are_told(change, told):
    experiment = tiny()
    for path, value in change.items():
        part, _, name = path.rpartition(".")
        setattr(getattr(experiment.main, part) if part else experiment.main, name, value)
    with pytest.raises(ValueError, match=told):
        config.check(experiment)


def test_rewards_differ():
    group = Group(Example("q", "", ("a",)), [])
    assert not rewards_differ(group, [Paid({"a": [1.0]}), Paid({"a": [1.0]})])
    assert rewards_differ(group, [Paid({"a": [1.0]}), Paid({"a": [0.0]})])
    assert rewards_differ(group, [Paid({"a": [1.0], "b": [0.5]}), Paid({"a": [1.0], "b": [0.0]})])


def test_an_unknown_algorithm_is_told():
    with pytest.raises(ValueError, match="no variant 'gpro'; there are: warm_start, warm_start_continued, grpo"):
        algorithms.get_config("gpro")
