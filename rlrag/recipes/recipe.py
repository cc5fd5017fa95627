"""A method as a value: who speaks, what is paid, how credit is given, what is minimised.

Nothing below a recipe knows which method is running. A new method is one file with a function
`build(experiment, task) -> tuple[Stage, ...]`, named in `Experiment.recipe`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rlrag import config
from rlrag.agents.workflow import Role, Workflow
from rlrag.objectives.credit import Credit
from rlrag.objectives.losses import Objective
from rlrag.rewards.paid import Reward
from rlrag.trajectory import Example, Trajectory

# A demonstration of an example; the number varies a demonstrator's dice.
Demonstrate = Callable[[Example, int], Trajectory]


class Recipe(NamedTuple):
    """roles: role -> model and sampling. rewards: the named rewards the credit adds up, in order. learn: model ->
    objective; a model that is absent is frozen. tools: host callables by the name workflows call them."""

    workflow: Workflow
    roles: Mapping[str, Role]
    reward: Reward
    rewards: tuple[str, ...]
    credit: Credit
    learn: Mapping[str, Objective]
    tools: Mapping[str, Callable] = {}  # read only


class Stage(NamedTuple):
    """A recipe played for a number of steps. demonstrate: learn from these in place of the policy's own episodes."""

    name: str
    recipe: Recipe
    settings: config.Stage
    steps: int
    demonstrate: Demonstrate | None = None
