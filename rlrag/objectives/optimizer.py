"""The optimizer and its learning rate: AdamW over whatever learns, exact where parameters are bfloat16."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Mastered(NamedTuple):
    inner: Any
    master: Any  # float32 originals of the parameters


def with_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 originals of narrower parameters (mixed-precision training, Micikevicius et al. 2018,
    arXiv 1710.03740, section 3.1): steps that bfloat16 would round away add up.

    An update is what leads from a parameter to its new original, in float32: rounded once, where it is applied.
    """

    def init(params: Any) -> Mastered:
        master = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return Mastered(inner.init(master), master)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, inner_state = inner.update(updates, state.inner, state.master)
        master: Any = jax.tree.map(jnp.add, state.master, steps)
        back = jax.tree.map(lambda new, leaf: new - leaf.astype(jnp.float32), master, params)
        return back, Mastered(inner_state, master)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def build_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip_norm: float, master: bool = False
):
    """AdamW behind a global-norm clip; a non-finite gradient changes nothing and is counted. master: keep float32
    originals of the parameters."""
    inner = optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    )
    inner = with_master_weights(inner) if master else inner
    return optax.apply_if_finite(inner, max_consecutive_errors=2**31 - 1)


def build_schedule(kind: str, peak: float, warm_up_steps: int, steps: int, final_fraction: float) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, cosine or linear to final_fraction of it at `steps`."""
    rest = max(steps - warm_up_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, final_fraction)
    elif kind == "linear":
        after = optax.linear_schedule(peak, peak * final_fraction, rest)
    else:
        raise ValueError(f"update.schedule is {kind!r}: choose constant, cosine or linear")
    if warm_up_steps == 0:
        return after
    # The first step is taken at peak / warm_up_steps, not at 0.
    warm_up = optax.linear_schedule(peak / warm_up_steps, peak, max(warm_up_steps - 1, 1))
    return optax.join_schedules([warm_up, after], [warm_up_steps])
