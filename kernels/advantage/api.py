"""Returns and GAE over rows of packed segments in which observed tokens stand between action tokens.

Both are one linear recurrence along T, run backwards, y_t = b_t + c_t y_(t+1), in which

    an action token      adds its own b and discounts what follows by c;
    an observed token    (documents, prompts) passes credit through untouched: b = 0, c = 1;
    a segment's last     token has c = 0, and so has padding (segment 0).

Time, for the discount, therefore counts actions, not tokens read. Pass episode ids as ``segment`` to let credit flow
across the calls of an episode that lie one after the other in a row. The end of a segment is the end of the
episode: nothing is bootstrapped behind it. Callers who train on the result stop its gradient.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.advantage import associative, reference
from kernels.dispatch import Implementation

Array = jax.Array

# In order of preference. A scan is T small steps: on an accelerator T launches, on CPU a loop without overhead that
# beats the log-depth form at every shape tried (64 x 1,024: 0.2 against 0.5 ms).
IMPLEMENTATIONS = {
    "associative": Implementation(associative.linear_recurrence, automatic=("cuda", "tpu")),
    "reference": Implementation(reference.linear_recurrence),
}


def linear_recurrence(b: Array, c: Array, *, implementation: str | None = None) -> Array:
    """y_t = b_t + c_t y_(t+1) along the last axis, backwards; b, c and y are [B, T] float32."""
    if b.ndim != 2 or b.shape != c.shape:
        raise ValueError(f"b and c must both be [B, T], got {b.shape} and {c.shape}")
    choice = dispatch.choose("advantage", IMPLEMENTATIONS, implementation, rows=b.shape[0], tokens=b.shape[1])
    b, c = b.astype(jnp.float32), c.astype(jnp.float32)
    return dispatch.call(IMPLEMENTATIONS, choice, lambda run: run, b, c)


def returns(
    rewards: Array,
    act: Array,
    segment: Array,
    gamma: float | Array,
    *,
    implementation: str | None = None,
) -> Array:
    """Discounted return of every action token, G_t = r_t + gamma G_(next action); 0 on other tokens; [B, T] float32.

    Args:
      rewards: [B, T] paid on action tokens; a reward on another token is nobody's and ignored.
      act: [B, T] action where > 0.
      segment: [B, T] int; 0 is padding, neighbours with equal ids are one segment.
      gamma: discount per action.
      implementation: a name, or None for the best on this platform.
    """
    action, continues = _structure(rewards, act, segment)
    b = jnp.where(action, rewards, 0)
    c = jnp.where(continues, jnp.where(action, gamma, 1.0), 0)
    return jnp.where(action, linear_recurrence(b, c, implementation=implementation), 0)


def gae(
    rewards: Array,
    values: Array,
    act: Array,
    segment: Array,
    gamma: float | Array,
    lam: float | Array,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Generalised advantages and value targets of action tokens, 0 on others; both [B, T] float32.

    A_t = delta_t + gamma lam A_(next action), delta_t = r_t + gamma V_(next action) - V_t, target_t = A_t + V_t
    (Schulman et al. 2016, arXiv 1506.02438, equation 16), V = 0 behind the last action of a segment.

    Args:
      values: [B, T]; read on action tokens only.
      lam: the lambda of GAE.
      rewards, act, segment, gamma, implementation: as in ``returns``.
    """
    action, continues = _structure(rewards, act, segment)
    values = jnp.where(action, values, 0).astype(jnp.float32)
    # The value of the first action at or behind a token is the same recurrence, cut at every action.
    through = jnp.where(continues & ~action, 1.0, 0.0)
    at_or_behind = linear_recurrence(values, through, implementation=implementation)
    next_value = jnp.where(continues, jnp.roll(at_or_behind, -1, axis=1), 0)
    delta = jnp.where(action, rewards + gamma * next_value - values, 0)
    c = jnp.where(continues, jnp.where(action, gamma * lam, 1.0), 0)
    advantages = jnp.where(action, linear_recurrence(delta, c, implementation=implementation), 0)
    return advantages, advantages + values


def _structure(rewards: Array, act: Array, segment: Array) -> tuple[Array, Array]:
    """[B, T] bool: is an action; is followed by a token of its own segment."""
    if rewards.ndim != 2 or not rewards.shape == act.shape == segment.shape:
        shapes = f"{rewards.shape}, {act.shape} and {segment.shape}"
        raise ValueError(f"rewards, act and segment must all be [B, T], got {shapes}")
    inside = segment > 0
    following = jnp.pad(segment[:, 1:], ((0, 0), (0, 1)))  # 0 behind the row
    return (act > 0) & inside, inside & (following == segment)
