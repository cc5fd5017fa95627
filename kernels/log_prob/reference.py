"""The plain implementation: the logits of all tokens at once; also the body that ``chunked`` runs on each chunk.

An implementation of ``log_prob`` is a module with these two functions; the one ``custom_vjp`` is in ``api.py``.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import token_stats as monoid
from kernels.token_stats import TokenStats

Array = jax.Array


def forward(hidden: Array, head: Array, ids: Array, scale: Array | None, chunk: int | None = None) -> TokenStats:
    """Statistics of softmax(scale * hidden @ head^T).

    Args:
      hidden: [B, T, D] float32 or bfloat16.
      head: [V, D].
      ids: [B, T, K] wanted vocabulary entries, negative for none.
      scale: [B, T] float32 inverse temperature, or None for 1.
      chunk: columns of T a chunk holds; there are no chunks here.
    """
    del chunk
    rows, tokens, num_wanted = ids.shape
    logits = _logits(hidden, head, scale)
    stats = monoid.finish(monoid.partial(logits, ids.reshape(-1, num_wanted), masked=False))
    return jax.tree.map(lambda flat: flat.reshape(rows, tokens, *flat.shape[1:]), stats)


def backward(
    hidden: Array,
    head: Array,
    ids: Array,
    scale: Array | None,
    lse: Array,
    entropy: Array,
    cotangent: TokenStats,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Gradients with respect to hidden [B, T, D] and head [V, D], both float32 sums; logits are computed again."""
    del chunk
    logits = _logits(hidden, head, scale)
    ids, lse, entropy, cotangent = jax.tree.map(
        lambda each: each.reshape(logits.shape[0], *each.shape[2:]), (ids, lse, entropy, cotangent)
    )
    if scale is not None:  # d logits / d (hidden @ head^T), a number a token: cheaper here than on [B * T, V]
        cotangent = jax.tree.map(lambda each: each * scale.reshape(-1, *[1] * (each.ndim - 1)), cotangent)
    dense = monoid.gradient(logits, ids, lse, entropy, cotangent, masked=False).astype(hidden.dtype)
    grad_hidden = _product(dense, head, (1, 0))
    grad_head = _product(dense, hidden.reshape(-1, hidden.shape[-1]), (0, 0))
    return grad_hidden.reshape(hidden.shape), grad_head


def _logits(hidden: Array, head: Array, scale: Array | None) -> Array:
    """[B * T, V] float32. Rows are flattened because XLA for CPU runs 2-D products up to 2.5x faster than 3-D ones."""
    logits = _product(hidden.reshape(-1, hidden.shape[-1]), head, (1, 1))
    return logits if scale is None else logits * scale.reshape(-1, 1)


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    """Matrix product summed in float32 whatever the inputs are."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
