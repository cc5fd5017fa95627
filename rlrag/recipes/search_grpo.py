"""A search agent learned by reinforcement: one stream, outcome reward, and the algorithm of the configuration, which by
default is GRPO's group z-score with a clipped surrogate.

Search-R1 (Jin et al. 2025, arXiv 2503.09516) with the group-relative advantage of Shao et al. 2024. The warm-up is
supervised learning on the task's demonstrations.
"""

from rlrag import config
from rlrag.agents.workflow import Role, Sampling
from rlrag.config import Experiment
from rlrag.data.task import Task
from rlrag.loading import load_function
from rlrag.objectives import credit, losses
from rlrag.recipes.algorithm import rewards_differ, with_algorithm
from rlrag.recipes.recipe import POLICY, WARM_UP, Learn, Recipe, Stage
from rlrag.rewards.answer import answer_reward
from rlrag.rewards.format import format_reward, search_r1_reward
from rlrag.rewards.length import overlong_reward
from rlrag.rewards.number import number_reward
from rlrag.rewards.own import own_reward
from rlrag.rewards.paid import Reward, combined


def build(experiment: Experiment, task: Task) -> tuple[Stage, ...]:
    """Warm-up, then the main stage's algorithm."""
    settings = experiment.main
    learning = with_algorithm(recipe(experiment, task), settings, task.workflow.max_tokens)
    accept = rewards_differ if settings.dynamic_sampling else None
    return (warm_up(experiment, task), Stage("main", learning, settings, experiment.steps, accept=accept))


def build_supervised(experiment: Experiment, task: Task) -> tuple[Stage, ...]:
    """Warm-up, then the same supervised learning for the main stage's steps: what GRPO must beat."""
    first = warm_up(experiment, task)
    return (first, first._replace(name="main", settings=experiment.main, steps=experiment.steps))


def warm_up(experiment: Experiment, task: Task) -> Stage:
    return Stage(WARM_UP, recipe(experiment, task), experiment.warm_up, experiment.warm_up.steps, task.demonstrate)


def recipe(experiment: Experiment, task: Task) -> Recipe:
    """The search agent's recipe with supervised learning."""
    train, evaluate = experiment.rollout.train, experiment.rollout.evaluate
    role = Role(
        POLICY,
        Sampling(train.temperature, train.top_k, train.top_p),
        Sampling(evaluate.temperature, evaluate.top_k, evaluate.top_p),
        *experiment.model.adapters.listed[:1],
    )
    reward, names = outcome_reward(experiment.reward, task.workflow.max_tokens)
    return Recipe(
        workflow=task.workflow,
        roles={"agent": role},
        reward=reward,
        rewards=names,
        credit=credit.ones(),
        learn={POLICY: Learn(losses.nll())},
    )


def outcome_reward(settings: config.Reward, max_tokens: int) -> tuple[Reward, tuple[str, ...]]:
    """What an episode is paid, and the names of its parts. max_tokens: the longest an episode can be."""
    parts, names = own_part(settings) if settings.function else answer_part(settings)
    if settings.overlong:
        parts.append((overlong_reward(max_tokens, settings.overlong_tokens), settings.overlong))
        names.append("overlong")
    return combined(*parts), tuple(names)


def own_part(settings: config.Reward) -> tuple[list[tuple[Reward, float]], list[str]]:
    """The user's function alone."""
    if settings.format:
        raise ValueError(f"reward.format is {settings.format}, but reward.function replaces it: give one of the two")
    return [(own_reward(load_function("reward.function", settings.function)), 1.0)], ["reward"]


def answer_part(settings: config.Reward) -> tuple[list[tuple[Reward, float]], list[str]]:
    """Rewards with their factors, and their names, for the answer and the format."""
    if settings.metric == "search_r1":
        if settings.format:
            raise ValueError(
                f"reward.format is {settings.format}: reward.metric=search_r1 has its own format rule, give 0"
            )
        return [(search_r1_reward(), 1.0), (answer_reward(), 0.0)], ["score"]  # EM and F1 for the record
    if settings.metric in ("gsm8k", "number"):
        return [(number_reward(lenient=settings.metric == "number"), 1.0)], ["answer"]
    answer = answer_reward(settings.metric)  # type: ignore[arg-type]  # checked there
    # A format that earns nothing is still counted: how often the protocol is kept.
    parts = [(answer, 1.0), (format_reward(), settings.format)]
    return parts, ["answer", "format"] if settings.format else ["answer"]
