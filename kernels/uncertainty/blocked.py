"""One read of the logits that serves draw and statistics alike: sums and maxima of short blocks of the vocabulary.

The sums of exp over blocks are the upper level of an inverse CDF in two levels and, added up, the lse; the largest
logits of the blocks say in which block the greedy token and the runner-up are. What is left to look at are two blocks
of a row. A cumulative sum over V costs six times as much on CPU, an argmax over V ten times (docs/LOG.md).

A vocabulary too large for the cache is read in chunks that are not, their sums merged by the monoid, so that [B, V] is
read from memory once. The vocabulary is cut, not B, so that B may be sharded over devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import token_stats as monoid
from kernels.token_stats import TokenSums
from kernels.uncertainty.reference import Drawn, first_above

Array = jax.Array

# Float32 logits of one chunk; the second-level cache of a core, and so of an accelerator's shared one.
CHUNK_BYTES = 2**21
BLOCK = 64  # vocabulary entries


def draw(
    logits: Array, uniform: Array, scale: Array, greedy: Array, masked: bool = True, chunk_bytes: int = CHUNK_BYTES
) -> Drawn:
    """As ``reference.draw``; masked=False saves the passes over each chunk that look for -inf."""
    vocabulary = logits.shape[1]
    num_chunks = 1 << (max(1, -(-4 * logits.size // chunk_bytes)) - 1).bit_length()
    width = max(vocabulary // num_chunks // BLOCK, 1) * BLOCK
    tables = [_whole_chunks(logits, scale, masked, width)] if vocabulary >= width else []
    if vocabulary % width:
        tables.append(_chunk(logits[:, vocabulary - vocabulary % width :], scale, masked))
    sums = tables[0][0] if len(tables) == 1 else monoid.combine(tables[0][0], tables[1][0])
    exponentials = [table * _ratio(maximum, sums.maximum) for _, maximum, table, _ in tables]
    maxima = jnp.concatenate([each for *_, each in tables], -1)  # [B, blocks]

    block, before = first_above(jnp.concatenate(exponentials, -1), uniform)
    inside = _block(logits, block) * scale[:, None]
    weights = jnp.exp(inside - jnp.where(sums.maximum == -jnp.inf, 0, sums.maximum)[:, None])
    place, _ = first_above(weights, (uniform * sums.exponentials - before) / weights.sum(-1))
    logit = jnp.take_along_axis(inside, place[:, None], -1)[:, 0]

    highest = jnp.argmax(maxima, -1).astype(jnp.int32)
    top = _block(logits, highest) * scale[:, None]
    best = jnp.argmax(top, -1).astype(jnp.int32)
    elsewhere = jnp.where(jnp.arange(maxima.shape[-1]) == highest[:, None], -jnp.inf, maxima).max(-1)
    second = jnp.maximum(elsewhere, jnp.where(jnp.arange(BLOCK) == best[:, None], -jnp.inf, top).max(-1))

    token = jnp.where(greedy, highest * BLOCK + best, block * BLOCK + place)
    stats = monoid.finish(sums)
    logit = jnp.where(greedy, sums.maximum, logit)
    # A row with nothing in it points anywhere.
    token = jnp.minimum(token, vocabulary - 1)
    return Drawn(token, logit, stats.lse, stats.entropy, stats.certainty, sums.maximum, second)


def _whole_chunks(logits: Array, scale: Array, masked: bool, width: int) -> tuple[TokenSums, Array, Array, Array]:
    """``_chunk`` of all whole chunks: their merged sums, and their tables one behind the other [B, blocks]."""
    rows, vocabulary = logits.shape
    if vocabulary // width == 1:
        return _chunk(logits[:, :width], scale, masked)

    def step(merged: TokenSums, start: Array) -> tuple[TokenSums, tuple[Array, Array, Array]]:
        sums, *table = _chunk(lax.dynamic_slice_in_dim(logits, start, width, axis=1), scale, masked)
        return monoid.combine(merged, sums), (table[0], table[1], table[2])

    starts = jnp.arange(0, vocabulary - width + 1, width)
    sums, tables = lax.scan(step, monoid.empty((rows,), 0), starts)
    maximum, exponentials, maxima = (jnp.moveaxis(each, 0, 1).reshape(rows, -1) for each in tables)
    return sums, maximum, exponentials, maxima


def _chunk(logits: Array, scale: Array, masked: bool) -> tuple[TokenSums, Array, Array, Array]:
    """The sums of a chunk; per block [B, blocks] the maximum they are relative to, sums of exp, and largest logits."""
    rows, width = logits.shape
    logits = logits.astype(jnp.float32) * scale[:, None]
    if width % BLOCK:
        logits = jnp.pad(logits, ((0, 0), (0, -width % BLOCK)), constant_values=-jnp.inf)
        masked = True
    maxima = logits.reshape(rows, -1, BLOCK).max(-1)
    maximum = maxima.max(-1)
    # XLA for CPU writes any [B, W] value that two reductions share to memory. For the exponentials, which two need and
    # nobody wants computed twice, that is asked for; different names for one offset keep the other chains apart.
    offset = jnp.where(maximum == -jnp.inf, 0, maximum)
    offset_weighted = lax.optimization_barrier(offset)
    offset_shifted = lax.optimization_barrier(offset_weighted)
    weights = lax.optimization_barrier(jnp.exp(logits - offset[:, None]))
    table = weights.reshape(rows, -1, BLOCK).sum(-1)
    # The floor turns -inf * e^-inf (NaN) into -1e30 * 0.
    weighted = (weights * jnp.maximum(logits - offset_weighted[:, None], -1e30)).sum(-1)
    if masked:
        present = logits > -jnp.inf
        shifted = jnp.where(present, logits - offset_shifted[:, None], 0).sum(-1)
        count = present.sum(-1, dtype=jnp.float32)
    else:
        shifted = (logits - offset_shifted[:, None]).sum(-1)
        count = jnp.full(rows, width, jnp.float32)
    sums = TokenSums(maximum, table.sum(-1), weighted, shifted, count, jnp.zeros((rows, 0)))
    return sums, jnp.broadcast_to(maximum[:, None], table.shape), table, maxima


def _ratio(maximum: Array, overall: Array) -> Array:
    """What sums relative to ``maximum`` [B, blocks] are multiplied by to be relative to ``overall`` [B]."""
    return jnp.exp(jnp.where(maximum == -jnp.inf, 0, maximum - overall[:, None]))


def _block(logits: Array, index: Array) -> Array:
    """Block ``index`` [B] of each row, float32 [B, BLOCK]; -inf behind the vocabulary."""
    vocabulary = logits.shape[-1]
    if vocabulary < BLOCK:
        logits = jnp.pad(logits, ((0, 0), (0, BLOCK - vocabulary)), constant_values=-jnp.inf)
        vocabulary = BLOCK
    # The last block of a vocabulary that it does not divide begins earlier, and is then moved into place.
    start = index * BLOCK
    inside = jnp.minimum(start, vocabulary - BLOCK)
    block = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (BLOCK,)))(logits, inside).astype(jnp.float32)
    if vocabulary % BLOCK == 0:
        return block
    column = jnp.arange(BLOCK) + (start - inside)[:, None]
    moved = jnp.take_along_axis(block, jnp.minimum(column, BLOCK - 1), axis=-1)
    return jnp.where(column < BLOCK, moved, -jnp.inf)
