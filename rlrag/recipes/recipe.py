"""A method as a value: who speaks, what is paid, how credit is given, what is minimised.

Nothing below a recipe knows which method is running. A new method is one file with a function
`build(experiment, task) -> tuple[Stage, ...]`, named in `Experiment.recipe`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rlrag import config
from rlrag.agents.workflow import Role, Workflow
from rlrag.objectives.coefficients import Coefficient
from rlrag.objectives.credit import Credit
from rlrag.objectives.losses import Objective
from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Example, Group, Trajectory

# Whether a group with these payments is worth learning from.
Accept = Callable[[Group, Sequence[Paid]], bool]

# A demonstration of an example; the number varies a demonstrator's dice.
Demonstrate = Callable[[Example, int], Trajectory]


POLICY = "policy"  # the model that a run begins with: others begin as copies of it
WARM_UP = "warm_up"  # the stage that a `warm_start` takes the place of


class Learn(NamedTuple):
    """How one model learns. reads: the model on whose batch it does, a critic on the policy's (empty: its own).
    optimizer: None for the stage's. trains: paths of the parameters that learn (empty: the stage's `update.trains`).
    reference: "start", the model as the stage begins, or "base", the same without its adapters."""

    objective: Objective
    reads: str = ""
    optimizer: config.Optimizer | None = None
    trains: str = ""
    reference: str = "start"


class Recipe(NamedTuple):
    """roles: role -> model and sampling. rewards: the named rewards the credit adds up, in order. learn: model -> how;
    a model that is absent is frozen. coefficients: of loss terms by name (1 where absent), and of what the credit
    penalises. tools: host callables by the name workflows call them."""

    workflow: Workflow
    roles: Mapping[str, Role]
    reward: Reward
    rewards: tuple[str, ...]
    credit: Credit
    learn: Mapping[str, Learn]
    coefficients: Mapping[str, Coefficient] = {}  # read only, and below
    tools: Mapping[str, Callable] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that speaks or learns, in a fixed order."""
        return tuple(dict.fromkeys([*(role.model for role in self.roles.values()), *self.learn]))


class Stage(NamedTuple):
    """A recipe played for a number of steps. demonstrate: learn from these in place of the policy's own episodes.
    accept: learn from groups that it accepts alone, more questions being played for those it does not."""

    name: str
    recipe: Recipe
    settings: config.Stage
    steps: int
    demonstrate: Demonstrate | None = None
    accept: Accept | None = None
