"""Token-chunked implementation: a loop over chunks of T, each of them the reference on a slice.

Memory is that of one chunk's logits, whatever T is. Chunks cut the token axis T and keep all rows B: with the batch
sharded over data every device then works on its own rows of every chunk, where chunks of B (or of B * T flattened)
would lie on one device each and move hidden states between devices. Tokens are cut and not the vocabulary because a
chunk is then one full-width product, which XLA runs at the speed of the unchunked one (tokamax on H100: vocabulary
chunks halve it), and because nothing has to be combined.

The gradient of a head that all devices hold is summed over them once a chunk: the reason for larger chunks on many
devices (``num_devices``). A head whose vocabulary is sharded costs sums of per-token numbers only.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.log_prob import reference
from kernels.token_stats import TokenStats

Array = jax.Array


def forward(hidden: Array, head: Array, ids: Array, scale: Array | None, chunk: int | None = None) -> TokenStats:
    """As ``reference.forward``, ``chunk`` columns of T at a time; None or chunk >= T is one chunk and no loop."""
    tokens = hidden.shape[1]
    if chunk is None or chunk >= tokens:
        return reference.forward(hidden, head, ids, scale)
    hidden, ids, scale = padded((hidden, ids, scale), tokens, chunk)

    def step(_: None, start: Array) -> tuple[None, TokenStats]:
        hidden_chunk, ids_chunk, scale_chunk = sliced((hidden, ids, scale), start, chunk)
        return None, reference.forward(hidden_chunk, head, ids_chunk, scale_chunk)

    _, stats = lax.scan(step, None, _starts(hidden, chunk))
    return jax.tree.map(lambda stacked: _join(stacked)[:, :tokens], stats)


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
    """As ``reference.backward``; the gradient of the head is one float32 sum carried over the chunks."""
    tokens = hidden.shape[1]
    if chunk is None or chunk >= tokens:
        return reference.backward(hidden, head, ids, scale, lse, entropy, cotangent)
    # Padding has zero cotangents, so that it adds exactly 0 to the gradient of the head.
    hidden_padded, *others = padded((hidden, ids, scale, lse, entropy, cotangent), tokens, chunk)

    def step(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        grad_hidden, grad_head = carry
        hidden_chunk, *others_chunk = sliced((hidden_padded, *others), start, chunk)
        grad_hidden_chunk, grad_head_chunk = reference.backward(hidden_chunk, head, *others_chunk)
        # Written in place into the carry: stacked outputs would cost a second copy of [B, T, D] to transpose.
        grad_hidden_chunk = grad_hidden_chunk.astype(grad_hidden.dtype)
        grad_hidden = lax.dynamic_update_slice_in_dim(grad_hidden, grad_hidden_chunk, start, axis=1)
        return (grad_hidden, grad_head + grad_head_chunk), None

    initial = jnp.zeros_like(hidden_padded), jnp.zeros(head.shape, jnp.float32)
    (grad_hidden, grad_head), _ = lax.scan(step, initial, _starts(hidden_padded, chunk))
    return grad_hidden[:, :tokens], grad_head


def chunk_length(tokens: int, limit: int) -> int:
    """Columns a chunk: the fewest chunks of at most ``limit`` columns, made equal so that padding stays below one
    column a chunk."""
    return -(-tokens // -(-tokens // max(1, limit)))


def _starts(hidden: Array, chunk: int) -> Array:
    return jnp.arange(0, hidden.shape[1], chunk)


def padded(arrays: tuple, tokens: int, chunk: int) -> tuple:
    padding = -tokens % chunk
    if padding == 0:
        return arrays
    return jax.tree.map(lambda each: jnp.pad(each, [(0, 0), (0, padding)] + [(0, 0)] * (each.ndim - 2)), arrays)


def sliced(arrays: tuple, start: Array, chunk: int) -> tuple:
    return jax.tree.map(lambda each: lax.dynamic_slice_in_dim(each, start, chunk, axis=1), arrays)


def _join(stacked: Array) -> Array:
    """[C, B, t, ...] -> [B, C * t, ...]."""
    num_chunks, rows, chunk, *rest = stacked.shape
    return jnp.moveaxis(stacked, 0, 1).reshape(rows, num_chunks * chunk, *rest)
