"""Softmax attention of packed rows, grouped queries, behind the one mask rule (``visibility``).

    out_i = sum_j softmax_j(query_i key_j) value_j   over the j that i sees

Which implementation runs is the platform's and the shapes' to say, as everywhere (``kernels.dispatch``).
"""

import math
from functools import partial

import jax

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.packed_attention import blockwise, cudnn, reference, splash
from kernels.packed_attention.visibility import Visibility

Array = jax.Array

# Rows of so many columns are cheaper by blocks: below, a row is a few blocks and little is skipped.
BLOCKWISE_TOKENS = 7 * blockwise.SMALL


def _too_short(tokens: int, **shape) -> str | None:
    return f"rows have {tokens} columns, fewer than {BLOCKWISE_TOKENS}" if tokens < BLOCKWISE_TOKENS else None


# In order of preference.
IMPLEMENTATIONS = {
    "cudnn": Implementation(cudnn.attend, ("cuda",), ("cuda",), cudnn.refuses),
    "splash": Implementation(splash.attend, ("tpu",), ("tpu",), splash.refuses),
    "blockwise": Implementation(blockwise.attend, refuses=_too_short),
    "reference": Implementation(reference.attend),
}


def attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Visibility,
    rows: tuple[str, ...] = (),
    heads: tuple[str, ...] = (),
    *,
    implementation: str | None = None,
) -> Array:
    """query [B, T, N, H], scaled by the caller; key, value [B, T, K, H], N a multiple of K -> [B, T, N, H].

    Differentiable with respect to query, key and value, once, in reverse mode. Scores and softmax are float32.

    Args:
      visible: who sees whom, leaves [B, T].
      rows, heads: axes of the mesh that B, and K with N, lie over (Auto axes). One that does not divide K is ignored.
      implementation: a name, or None for the best on this platform.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    if key.shape != (B, T, K, H) or value.shape != key.shape or N % K:
        raise ValueError(f"key and value must be [{B}, {T}, K, {H}], {N} a multiple of K: {key.shape}, {value.shape}")
    sizes = jax.sharding.get_abstract_mesh().shape
    divided = K % math.prod(sizes[axis] for axis in heads) == 0
    shape = {"tokens": T, "head_dim": H, "dtype": query.dtype, "divided": divided}
    choice = dispatch.choose("packed_attention", IMPLEMENTATIONS, implementation, **shape)
    # This process's platform decides, without lax.platform_dependent: implementations keep different things for their
    # gradients, and a branch keeps room for those of all.
    run = IMPLEMENTATIONS[choice.default].run
    if choice.default in ("blockwise", "splash"):
        run = partial(run, rows=rows, heads=heads if divided else ())
    return run(query, key, value, visible)
