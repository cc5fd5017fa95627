"""Block after block of pages with an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), up to the longest
live slot: what is read follows the tokens that there are, not the room that there is. Plain XLA, for any platform."""

import jax
import jax.numpy as jnp

from kernels import loops
from kernels.decode_attention.reference import MASKED, visible

Array = jax.Array

# Tokens of a slot in one turn. On CPU a turn's keys and scores stay in cache. On a GPU a loop whose end the data decide
# waits for the host at every turn, so turns are few.
BLOCK_TOKENS = {"cpu": 128}
BLOCK_TOKENS_DEFAULT = 1024


def attend(
    query: Array, keys: Array, values: Array, table: Array, length: Array, *, page_size: int, window: int | None,
    block_tokens: int | None = None,
) -> Array:  # fmt: skip
    """As ``reference.attend``. The loop's trip count is dynamic, so one compilation serves all lengths."""
    B, N, H = query.shape
    K, room = keys.shape[0], table.shape[1] * page_size
    block_tokens = min(room, block_tokens or BLOCK_TOKENS.get(jax.default_backend(), BLOCK_TOKENS_DEFAULT))
    # Pages longer than a block are read in pieces, shorter ones several at a time.
    piece = next(size for size in range(min(page_size, block_tokens), 0, -1) if page_size % size == 0)
    pieces_per_page, pieces = page_size // piece, max(1, block_tokens // piece)
    block = pieces * piece
    stores = [store.reshape(K, -1, piece, H) for store in (keys, values)]
    q = query.reshape(B, K, N // K, H)

    def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, most, sums = carry
        index = number * pieces + jnp.arange(pieces)
        pages = jnp.take(table, jnp.minimum(index // pieces_per_page, table.shape[1] - 1), axis=1)
        places = pages * pieces_per_page + index % pieces_per_page
        key, value = (store[:, places].reshape(K, B, block, H) for store in stores)
        seen = visible(number * block + jnp.arange(block), length, window)
        scores = jnp.einsum("bkgh,kbsh->kbgs", q, key, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None], scores, MASKED)
        new_most = jnp.maximum(most, scores.max(-1))
        # Where nothing has been seen yet the maximum is MASKED, and what is masked would weigh 1.
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_most[..., None]), 0)
        value = jnp.where(seen[..., None], value, 0)
        mixed = jnp.einsum("kbgs,kbsh->kbgh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        kept = jnp.exp(most - new_most)
        return total * kept[..., None] + mixed, new_most, sums * kept + weights.sum(-1)

    first = jnp.maximum(length - window, 0) if window else jnp.zeros_like(length)
    begin = jnp.min(jnp.where(length > 0, first, jnp.iinfo(first.dtype).max)) // block
    end = -(-jnp.max(length) // block)
    shape = K, B, N // K
    start = jnp.zeros((*shape, H), jnp.float32), jnp.full(shape, MASKED), jnp.zeros(shape, jnp.float32)
    total, _, sums = loops.fori_loop(begin, end, step, start, -(-room // block))
    out = total / jnp.where(sums > 0, sums, 1)[..., None]
    return out.astype(query.dtype).transpose(1, 0, 2, 3).reshape(B, N, H)
