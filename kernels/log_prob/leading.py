"""Statistics of the first columns alone, as many as the data say: a loop over chunks of T that ends where they end.

What is trained is a part of most rows (observed documents and prompts are the rest), how large a part differs from
batch to batch, and shapes must not: the caller moves the columns that count to the front and says how many there are.
Any implementation computes the chunks. The number of turns is the data's, which reverse mode could not follow by
itself; both halves of the operation's one ``custom_vjp`` are such loops.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels import loops
from kernels.log_prob import chunked
from kernels.token_stats import TokenStats

Array = jax.Array


def forward(
    run: Callable, count: Array, chunk: int, hidden: Array, head: Array, ids: Array, scale: Array | None
) -> TokenStats:
    """As an implementation's ``forward`` (run) on columns [0, count), up to the end of the chunk; 0 behind it."""
    rows, tokens, num_wanted = ids.shape
    hidden, ids, scale = chunked.padded((hidden, ids, scale), tokens, chunk)

    def step(number: Array, stats: TokenStats) -> TokenStats:
        hidden_chunk, ids_chunk, scale_chunk = chunked.sliced((hidden, ids, scale), number * chunk, chunk)
        return _written(stats, run(hidden_chunk, head, ids_chunk, scale_chunk), number * chunk)

    zeros = jnp.zeros((rows, hidden.shape[1]), jnp.float32)
    initial = TokenStats(zeros, zeros, zeros, jnp.zeros((*zeros.shape, num_wanted), jnp.float32))
    stats = loops.fori_loop(0, _turns(count, chunk), step, initial, hidden.shape[1] // chunk)
    return jax.tree.map(lambda each: each[:, :tokens], stats)


def backward(
    run: Callable, count: Array, chunk: int, hidden: Array, head: Array, ids: Array, scale: Array | None,
    lse: Array, entropy: Array, cotangent: TokenStats,
) -> tuple[Array, Array]:  # fmt: skip
    """As an implementation's ``backward`` (run); hidden states behind the columns receive 0."""
    tokens = hidden.shape[1]
    padded = chunked.padded((hidden, ids, scale, lse, entropy, cotangent), tokens, chunk)

    def step(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        grad_hidden, grad_head = carry
        hidden_chunk, *others = chunked.sliced(padded, number * chunk, chunk)
        grad_hidden_chunk, grad_head_chunk = run(hidden_chunk, head, *others)
        return _written(grad_hidden, grad_hidden_chunk, number * chunk), grad_head + grad_head_chunk

    initial = jnp.zeros_like(padded[0]), jnp.zeros(head.shape, jnp.float32)
    most = padded[0].shape[1] // chunk
    grad_hidden, grad_head = loops.fori_loop(0, _turns(count, chunk), step, initial, most)
    return grad_hidden[:, :tokens], grad_head


def _turns(count: Array, chunk: int) -> Array:
    return (count + chunk - 1) // chunk


def _written(whole, part, start: Array):
    """Each array of `part` [B, t, ...] written into `whole` [B, T, ...] from column `start` on."""
    return jax.tree.map(
        lambda into, each: lax.dynamic_update_slice_in_dim(into, each.astype(into.dtype), start, axis=1), whole, part
    )
