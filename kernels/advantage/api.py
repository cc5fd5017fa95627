"""Returns and GAE over rows of packed segments in which observed tokens stand between action tokens.

Both are one linear recurrence along T, run backwards, y_t = b_t + c_t y_(t+1) (``terms`` says of what), in which

    an action token      adds its own b and discounts what follows by c;
    an observed token    (documents, prompts) passes credit through untouched: b = 0, c = 1;
    a segment's last     token has c = 0, and so has padding (segment 0).

Time, for the discount, therefore counts actions, not tokens read. Pass episode ids as ``segment`` to let credit flow
across the calls of an episode that lie one after the other in a row. The end of a segment is the end of the
episode: nothing is bootstrapped behind it. Callers who train on the result stop its gradient.

Moments of the advantages come with them, by row and, where tokens are given groups, by group: what whitening and
baselines want, from the same read. A token counts in the group that is given to it: a return that is to count once an
episode has its group on the episode's first action, and -1 on the others.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.advantage import associative, mosaic_gpu, mosaic_tpu, recurrent, reference
from kernels.advantage.terms import Advantages
from kernels.dispatch import Implementation

Array = jax.Array

# In order of preference. A scan is T small steps: on an accelerator T launches, on CPU a loop without overhead that
# beats the log-depth form (64 x 4,096: 1.4 against 2.0 ms) and blocks solved side by side (1.8 ms). The kernels are
# chosen by name until a table measured on their hardware says that they win.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.gae, platforms=("cuda",), automatic=(), refuses=mosaic_gpu.refuses),
    "mosaic_tpu": Implementation(mosaic_tpu.gae, platforms=("tpu",), automatic=(), refuses=mosaic_tpu.refuses),
    "associative": Implementation(
        functools.partial(recurrent.gae, associative.linear_recurrence), automatic=("cuda", "tpu")
    ),
    "reference": Implementation(functools.partial(recurrent.gae, reference.linear_recurrence)),
}


def returns(
    rewards: Array,
    act: Array,
    segment: Array,
    gamma: float | Array,
    *,
    group: Array | None = None,
    num_groups: int = 0,
    implementation: str | None = None,
) -> Advantages:
    """Discounted return of every action token, G_t = r_t + gamma G_(next action), as ``advantages`` and their moments.

    Args:
      rewards: [B, T] paid on action tokens; a reward on another token is nobody's and ignored.
      act: [B, T] action where > 0.
      segment: [B, T] int; 0 is padding, neighbours with equal ids are one segment.
      gamma: discount per action.
      group: [B, T] int in 0 ... num_groups - 1 of what each action token counts for in ``groups``; others for none.
        None: ``groups`` is None.
      num_groups: static.
      implementation: a name, or None for the best on this platform.
    """
    return _dispatched(rewards, None, act, segment, gamma, 1.0, group, num_groups, implementation)


def gae(
    rewards: Array,
    values: Array,
    act: Array,
    segment: Array,
    gamma: float | Array,
    lam: float | Array,
    *,
    group: Array | None = None,
    num_groups: int = 0,
    implementation: str | None = None,
) -> Advantages:
    """Generalised advantages and value targets of action tokens, 0 on others, and the moments of each row's advantages.

    A_t = delta_t + gamma lam A_(next action), delta_t = r_t + gamma V_(next action) - V_t, target_t = A_t + V_t
    (Schulman et al. 2016, arXiv 1506.02438, equation 16), V = 0 behind the last action of a segment.

    Args:
      values: [B, T]; read on action tokens only.
      lam: the lambda of GAE.
      rewards, act, segment, gamma, group, num_groups, implementation: as in ``returns``.
    """
    return _dispatched(rewards, values, act, segment, gamma, lam, group, num_groups, implementation)


def _dispatched(
    rewards: Array,
    values: Array | None,
    act: Array,
    segment: Array,
    gamma: float | Array,
    lam: float | Array,
    group: Array | None,
    num_groups: int,
    implementation: str | None,
) -> Advantages:
    given = [each.shape for each in (rewards, act, segment, values, group) if each is not None]
    if rewards.ndim != 2 or len(set(given)) > 1:
        shapes = ", ".join(map(str, given))
        raise ValueError(f"rewards, act, segment, values and group must all be [B, T], got {shapes}")
    if (group is None) != (num_groups == 0):
        raise ValueError(f"num_groups is {num_groups}: give it with group, and neither without the other")
    rows, tokens = rewards.shape
    choice = dispatch.choose(
        "advantage", IMPLEMENTATIONS, implementation, rows=rows, tokens=tokens, num_groups=num_groups
    )
    values = None if values is None else values.astype(jnp.float32)
    integers = (each.astype(jnp.int32) for each in (act, segment))
    discounts = (jnp.asarray(each, jnp.float32) for each in (gamma, lam))
    group = None if group is None else group.astype(jnp.int32)
    arguments = rewards.astype(jnp.float32), values, *integers, *discounts, group
    with_groups = functools.partial(functools.partial, num_groups=num_groups)
    return dispatch.call(IMPLEMENTATIONS, choice, with_groups, *arguments)
