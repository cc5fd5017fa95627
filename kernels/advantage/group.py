"""Statistics of the rewards of a group (the episodes of one question), as segment sums over the whole batch.

Segment sums, not a reshape to [groups, members]: members of a group may lie on several devices or rows, in any order,
and their number may differ (failed episodes are not valid).
"""

import functools

import jax
import jax.numpy as jnp

from kernels.advantage.terms import Moments, moments

Array = jax.Array


def group_moments(values: Array, group: Array, valid: Array, num_groups: int) -> Moments:
    """Count, mean and summed squared distances of each group, float32 [num_groups].

    values [N]; group [N] int, outside 0 ... num_groups - 1: no group's; valid [N] bool: the others do not count.
    """
    inside = valid & (group >= 0) & (group < num_groups)
    total = functools.partial(_group_sum, group=group, num_groups=num_groups)
    return moments(values, inside.astype(jnp.float32), total, lambda found: found[group])


def group_zscore(
    rewards: Array,
    group: Array,
    valid: Array,
    num_groups: int,
    *,
    epsilon: float = 1e-6,
    ddof: int = 1,
    divide: bool = True,
) -> Array:
    """(r - mean) / (std + epsilon) within each group; 0 where not valid; [N] float32.

    The group-relative advantage of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). The defaults (sample
    standard deviation, epsilon 1e-6) are those of verl and of Search-R1, whose ``torch.std`` divides by n - 1 (TRL:
    epsilon 1e-4); the paper does not say which. A group whose rewards are all equal, or that has one valid member, says
    nothing and gives exactly 0. (verl leaves the reward of a group of one as it is: that trains on an absolute reward.)

    Args:
      rewards: [N].
      group: [N] int in 0 ... num_groups - 1.
      valid: [N] bool; the others neither count nor receive.
      num_groups: static.
      epsilon: added to the standard deviation.
      ddof: the variance divides by n - ddof; 1 is the sample's, 0 the population's.
      divide: False leaves r - mean (Dr. GRPO, arXiv 2503.20783).
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {ddof}")
    rewards, valid = _checked(rewards, group, valid, num_groups)
    count, mean, spread = group_moments(rewards, group, valid, num_groups)
    centred = jnp.where(valid, rewards - mean[group], 0)
    informative = valid & _differs(rewards, group, valid, num_groups)
    if not divide:
        return jnp.where(informative, centred, 0)
    variance = spread / jnp.maximum(count - ddof, 1)
    return jnp.where(informative, centred / (jnp.sqrt(variance) + epsilon)[group], 0)


def group_leave_one_out(rewards: Array, group: Array, valid: Array, num_groups: int) -> Array:
    """Reward minus the mean of the others in its group; 0 where not valid or alone; [N] float32.

    The REINFORCE leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    Arguments as in ``group_zscore``.
    """
    rewards, valid = _checked(rewards, group, valid, num_groups)
    others = (_group_sum(valid.astype(jnp.float32), group, num_groups)[group] - 1).astype(jnp.float32)
    total = _group_sum(rewards, group, num_groups)[group]
    baseline = (total - rewards) / jnp.maximum(others, 1)
    differs = _differs(rewards, group, valid, num_groups)
    return jnp.where(valid & (others > 0) & differs, rewards - baseline, 0)


def _checked(rewards: Array, group: Array, valid: Array, num_groups: int) -> tuple[Array, Array]:
    """Rewards with 0 where not valid, and validity, which a group outside 0 ... num_groups - 1 has not."""
    if rewards.ndim != 1 or not rewards.shape == group.shape == valid.shape:
        shapes = f"{rewards.shape}, {group.shape} and {valid.shape}"
        raise ValueError(f"rewards, group and valid must all be [N], got {shapes}")
    valid = valid.astype(bool) & (group >= 0) & (group < num_groups)
    return jnp.where(valid, rewards, 0).astype(jnp.float32), valid


def _differs(rewards: Array, group: Array, valid: Array, num_groups: int) -> Array:
    """Whether the group of each has rewards that are not all equal; [N] bool.

    Equality is read from the rewards: their float32 mean may differ from them by a rounding, which is no advantage, and
    which a division by epsilon would blow up.
    """
    high = jax.ops.segment_max(jnp.where(valid, rewards, -jnp.inf), group, num_groups)
    low = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), group, num_groups)
    return (high > low)[group]


def _group_sum(values: Array, group: Array, num_groups: int) -> Array:
    return jax.ops.segment_sum(values, group, num_groups)
