"""The algorithm of a stage, from its configuration: credit, objectives and coefficients.

Each field chooses one part, and the parts go together freely; configs/algorithms.py has the published combinations.
"""

from collections.abc import Sequence

from rlrag import config
from rlrag.objectives import credit, losses
from rlrag.objectives.coefficients import Coefficient
from rlrag.objectives.credit import Credit
from rlrag.objectives.losses import Objective
from rlrag.recipes.recipe import POLICY, Learn, Recipe
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Group

CRITIC = "critic"


def with_algorithm(recipe: Recipe, stage: config.Stage, max_tokens: int) -> Recipe:
    """The recipe learning by the stage's algorithm. max_tokens: the longest an episode can be."""
    policy = build_objective(stage, max_tokens, len(recipe.roles))
    learn = {POLICY: Learn(policy, reference=stage.loss.reference)}
    critic = losses.value(stage.loss.value_clip)
    if stage.loss.critic == "trunk":
        learn = {POLICY: Learn(losses.joined(policy, critic), reference=stage.loss.reference)}
    elif stage.loss.critic == "separate":
        learn[CRITIC] = Learn(critic, reads=POLICY, optimizer=stage.critic)
    return recipe._replace(credit=build_credit(stage), learn=learn, coefficients=build_coefficients(stage))


def build_credit(stage: config.Stage) -> Credit:
    c = stage.credit
    kl_reward = stage.loss.kl_estimator if c.kl_reward else None
    if c.kind == "group":
        return credit.group_relative(c.divide, kl_reward=kl_reward)
    if c.kind == "leave_one_out":
        return credit.leave_one_out(kl_reward)
    if c.kind == "returns":
        return credit.returns(c.gamma, c.baseline, c.whiten, kl_reward)
    if c.kind == "gae":
        return credit.gae(c.gamma, c.lam, c.whiten, kl_reward)
    if c.kind == "rejection":
        return credit.rejection(c.threshold)
    raise ValueError(f"credit.kind is {c.kind!r}: choose {' or '.join(config.CHOICES[config.Credit]['kind'])}")


def build_objective(stage: config.Stage, max_tokens: int, num_roles: int) -> Objective:
    l, needs_reference = stage.loss, bool(stage.credit.kl_reward)
    if stage.credit.kind == "rejection":
        return losses.nll(weighted_mean=True, num_roles=num_roles)
    objective = losses.surrogate(
        l.clip_low,
        l.clip_high,
        ratio=l.ratio,
        aggregate=l.aggregate,
        constant_tokens=l.constant_tokens or max_tokens,
        dual_clip=l.dual_clip,
        kl=l.kl_estimator if l.kl else None,
        entropy=l.entropy > 0,
        recompute_old=l.old_logp == "recompute",
        importance=l.importance,
        importance_cap=l.importance_cap,
        num_roles=num_roles,
    )
    return objective._replace(needs=objective.needs | {"ref_logp"}) if needs_reference else objective


def build_coefficients(stage: config.Stage) -> dict[str, Coefficient]:
    l, c = stage.loss, stage.credit
    coefficients = {}
    if l.kl:
        coefficients["kl"] = Coefficient(l.kl, "kl", l.kl_target, l.kl_horizon)
    if c.kl_reward:
        coefficients["kl_reward"] = Coefficient(c.kl_reward, "kl_reward", l.kl_target, l.kl_horizon)
    if l.entropy:
        coefficients["entropy"] = Coefficient(l.entropy)
    if l.critic == "trunk":
        coefficients["value"] = Coefficient(l.value)
    return coefficients


def rewards_differ(group: Group, payments: Sequence[Paid]) -> bool:
    """Whether the episodes of a group earned different rewards, so that there is something to learn from it (dynamic
    sampling, Yu et al. 2025, arXiv 2503.14476, section 3.2)."""
    earned = {tuple(tuple(values) for _, values in sorted(paid.per_call.items())) for paid in payments}
    return len(earned) > 1
