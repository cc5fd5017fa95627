"""A search agent learned by GRPO: one stream, outcome reward, group z-score, clipped surrogate.

Search-R1 (Jin et al. 2025, arXiv 2503.09516) with the group-relative advantage of Shao et al. 2024. The warm-up is
supervised learning on the task's demonstrations.
"""

from rlrag import config
from rlrag.agents.workflow import Role, Sampling
from rlrag.config import Experiment
from rlrag.data.task import Task
from rlrag.objectives import credit, losses
from rlrag.recipes.recipe import Recipe, Stage
from rlrag.rewards.answer import answer_reward
from rlrag.rewards.format import format_reward, search_r1_reward
from rlrag.rewards.paid import Reward, combined

POLICY = "policy"


def build(experiment: Experiment, task: Task) -> tuple[Stage, ...]:
    """Warm-up, then GRPO."""
    update = experiment.main.update
    rl = recipe(experiment, task)._replace(
        credit=credit.group_relative(),
        learn={POLICY: losses.surrogate(update.clip_low, update.clip_high, update.kl, update.old_logp == "recompute")},
    )
    return (warm_up(experiment, task), Stage("main", rl, experiment.main, experiment.steps))


def build_supervised(experiment: Experiment, task: Task) -> tuple[Stage, ...]:
    """Warm-up, then the same supervised learning for the main stage's steps: what GRPO must beat."""
    first = warm_up(experiment, task)
    return (first, first._replace(name="main", settings=experiment.main, steps=experiment.steps))


def warm_up(experiment: Experiment, task: Task) -> Stage:
    return Stage("warm_up", recipe(experiment, task), experiment.warm_up, experiment.warm_up.steps, task.demonstrate)


def recipe(experiment: Experiment, task: Task) -> Recipe:
    """The search agent's recipe with supervised learning."""
    train, evaluate = experiment.rollout.train, experiment.rollout.evaluate
    role = Role(
        POLICY,
        Sampling(train.temperature, train.top_k, train.top_p),
        Sampling(evaluate.temperature, evaluate.top_k, evaluate.top_p),
    )
    reward, names = outcome_reward(experiment.reward)
    return Recipe(
        workflow=task.workflow,
        roles={"agent": role},
        reward=reward,
        rewards=names,
        credit=credit.ones(),
        learn={POLICY: losses.nll()},
    )


def outcome_reward(settings: config.Reward) -> tuple[Reward, tuple[str, ...]]:
    """What an episode is paid, and the names of its parts."""
    if settings.metric == "search_r1":
        if settings.format:
            raise ValueError(
                f"reward.format is {settings.format}: reward.metric=search_r1 has its own format rule, give 0"
            )
        return combined((search_r1_reward(), 1.0), (answer_reward(), 0.0)), ("score",)  # EM and F1 for the record
    answer = answer_reward(settings.metric)  # type: ignore[arg-type]  # checked there
    if not settings.format:
        return answer, ("answer",)
    return combined((answer, 1.0), (format_reward(), settings.format)), ("answer", "format")
