"""One read of the logits: a loop over vocabulary blocks that fit in cache, their sums merged by the monoid.

Every reduction over a block after the first finds it in cache, so [B, V] is read from memory once. A decode batch that
fits as a whole is one block and no loop. The vocabulary is cut, not B, so that B may be sharded over devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import token_stats as monoid
from kernels.token_stats import TokenStats
from kernels.uncertainty.reference import top_two

Array = jax.Array

# Float32 logits of one block; the second-level cache of a core, and so of an accelerator's shared one.
BLOCK_BYTES = 2**21


def statistics(
    logits: Array, ids: Array, scale: Array, masked: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[TokenStats, Array, Array]:
    """As ``reference.statistics``; masked=False saves the passes over each block that look for -inf."""
    rows, vocabulary = logits.shape
    # A power of two divides the vocabulary of every model in arg_specs, so that no block overlaps another.
    num_blocks = 1 << (max(1, -(-4 * logits.size // block_bytes)) - 1).bit_length()
    if num_blocks == 1 or num_blocks > vocabulary:
        return _finish(_block(logits, ids, scale, 0, masked))
    width = -(-vocabulary // num_blocks)
    overlaps = vocabulary % width > 0

    def step(carry: tuple, first_column: Array) -> tuple[tuple, None]:
        # The last block is moved left to end at V; what an earlier block has seen of it is masked.
        start = jnp.minimum(first_column, vocabulary - width)
        block = lax.dynamic_slice_in_dim(logits, start, width, axis=1)
        if overlaps:
            block = jnp.where(jnp.arange(width) >= first_column - start, block, -jnp.inf)
        return _merge(carry, _block(block, ids, scale, start, masked or overlaps)), None

    none = jnp.full((rows,), -jnp.inf, jnp.float32)
    initial = monoid.empty((rows,), ids.shape[-1]), none, none
    return _finish(lax.scan(step, initial, jnp.arange(0, vocabulary, width))[0])


def _block(block: Array, ids: Array, scale: Array, start: Array | int, masked: bool) -> tuple:
    block = block.astype(jnp.float32) * scale[:, None]
    return monoid.partial(block, ids, start=start, masked=masked), *top_two(block)


def _merge(left: tuple, right: tuple) -> tuple:
    (left_sums, left_first, left_second), (right_sums, right_first, right_second) = left, right
    second = jnp.maximum(jnp.minimum(left_first, right_first), jnp.maximum(left_second, right_second))
    return monoid.combine(left_sums, right_sums), jnp.maximum(left_first, right_first), second


def _finish(merged: tuple) -> tuple[TokenStats, Array, Array]:
    sums, first, second = merged
    return monoid.finish(sums), first, second
