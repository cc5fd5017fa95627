"""What the accelerator kernels of log_prob share: all but the two programs that compute logits tile by tile.

A kernel is handed hidden states [N, D], a block of the head [V, D] and numbers of each token, and never a vocabulary
id. The wanted logits are dot products with the K rows of the head that ``ids`` names, a gather of [N, D] at a time:
N K D multiplications beside the N V D of the kernel, which so does not compare every column with every id. In the
backward pass the kernel writes

    dz = (A - B log p) p - C        A = r (g_lse + g_certainty - g_H H),  B = r g_H,  C = r g_certainty / V

(r is the inverse temperature) for one block of the vocabulary, in the dtype of the inputs; the entries of wanted ids
are then replaced by their whole value, summed in float32 (bfloat16 -g p + g would lose the gradient of a confident
token), and two plain matrix products, which the compiler runs at full speed, take dz to the gradients:

    d hidden += dz head_block       d head_block = dz^T hidden

Blocks cut the vocabulary and not the tokens: of the two gradients that of the head [V, D] is the larger one, and it is
written once, in the dtype of the head, where chunks of tokens would read and write it, in float32, once a chunk.
Logits are computed twice and multiplied twice: 8 N D V operations, the least without storing them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import tiles as measured
from kernels import token_stats as monoid
from kernels.token_stats import TokenStats, TokenSums

Array = jax.Array

# Of dz, the one large temporary: 1/32 of what float32 logits of all tokens would take, but no less than 256 MiB.
BLOCK_BYTES_LEAST = 2**28
BLOCK_SHARE = 32

Sums = Callable[..., TokenSums]  # (hidden [N, D], head [V, D], scale [N], **tiles) -> [N], logits [N, 0]
Dense = Callable[..., Array]  # (hidden [N, D], head [W, D], rows [5, N], **tiles) -> dz [N, W]
OPERATION = "log_prob"  # of what tiles.json records


def halves(sums: Sums, dense: Dense, default: dict[str, int]) -> tuple[Callable[..., TokenStats], Callable]:
    """The two functions of an implementation, from its two kernels: ``forward(..., **tiles)`` as ``reference.forward``
    and ``backward(..., block_bytes=, **tiles)`` as ``backward`` below.

    tiles: sizes by name, block_n among them; those not given are what ``tiles.json`` has for this device and shape, or
    the default's. Chunks of tokens, as the other implementations know them, there are none.
    """

    def sizes(hidden: Array, head: Array, given: dict[str, int]) -> dict[str, int]:
        shape = {"tokens": math.prod(hidden.shape[:-1]), "hidden": hidden.shape[-1], "vocabulary": head.shape[0]}
        return {**default, **measured.lookup(OPERATION, measured.device_kind(), **shape), **given}

    def both_forward(
        hidden: Array, head: Array, ids: Array, scale: Array | None, chunk: int | None = None, **tiles: int
    ) -> TokenStats:
        del chunk
        return forward(partial(sums, **sizes(hidden, head, tiles)), hidden, head, ids, scale)

    def both_backward(
        hidden: Array, head: Array, *others: Any, chunk: int | None = None, block_bytes: int | None = None, **tiles: int
    ) -> tuple[Array, Array]:
        del chunk
        own = sizes(hidden, head, tiles)
        return backward(partial(dense, **own), hidden, head, *others, multiple=own["block_n"], block_bytes=block_bytes)

    return both_forward, both_backward


def forward(sums: Sums, hidden: Array, head: Array, ids: Array, scale: Array | None) -> TokenStats:
    """As ``reference.forward``, with the five sums of each token from a kernel."""
    flat, flat_ids, flat_scale = _flat(hidden, ids, scale)
    found = sums(flat, head, flat_scale)
    wanted = wanted_logits(flat, head, flat_ids, flat_scale)
    stats = monoid.finish(found._replace(logits=wanted))
    return jax.tree.map(lambda each: each.reshape(*hidden.shape[:2], *each.shape[1:]), stats)


def backward(
    dense: Dense,
    hidden: Array,
    head: Array,
    ids: Array,
    scale: Array | None,
    lse: Array,
    entropy: Array,
    cotangent: TokenStats,
    *,
    multiple: int,
    block_bytes: int | None = None,
) -> tuple[Array, Array]:
    """As ``reference.backward``, with dz of one block of the vocabulary at a time from a kernel.

    Args:
      dense: called with blocks of a multiple of ``multiple`` columns, the last of them padded with zero rows of head.
      multiple: of columns that the kernel computes at once.
      block_bytes: of dz; None follows the size of the problem.

    Returns the gradients of hidden, float32, and of head, in its dtype.
    """
    flat, flat_ids, flat_scale = _flat(hidden, ids, scale)
    tokens, vocabulary = flat.shape[0], head.shape[0]
    lse, entropy = lse.reshape(-1), entropy.reshape(-1)
    cotangent = jax.tree.map(lambda each: each.reshape(tokens, *each.shape[2:]), cotangent)
    weight = cotangent.lse + cotangent.certainty - cotangent.entropy * entropy
    rows = jnp.stack([jnp.ones_like(lse), weight, cotangent.entropy, cotangent.certainty / vocabulary])
    rows = jnp.stack([flat_scale, lse, *(rows[1:] * flat_scale)])
    wanted = wanted_logits(flat, head, flat_ids, flat_scale)
    values = _wanted_gradient(wanted, flat_ids, rows, cotangent.logits * flat_scale[:, None]).astype(hidden.dtype)

    def block(grad_hidden: Array, start: Array | int, part: Array) -> tuple[Array, Array]:
        dz = _replace(dense(flat, part, rows), flat_ids - start, values, part.shape[0])
        return grad_hidden + _product(dz, part, (1, 0)), _product(dz, flat, (0, 0)).astype(head.dtype)

    def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        grad_hidden, grad_head = carry
        start = index * width
        part = lax.dynamic_slice_in_dim(head, start, width, axis=0)
        grad_hidden, grad_part = block(grad_hidden, start, part)
        return grad_hidden, lax.dynamic_update_slice_in_dim(grad_head, grad_part, start, axis=0)

    width = block_width(tokens, vocabulary, head.dtype.itemsize, multiple, block_bytes)
    num_blocks = vocabulary // width
    carry = jnp.zeros(flat.shape, jnp.float32), jnp.zeros_like(head)
    grad_hidden, grad_head = lax.fori_loop(0, num_blocks, step, carry) if num_blocks else carry
    rest = vocabulary - num_blocks * width
    if rest:
        part = jnp.pad(head[-rest:], ((0, -rest % multiple), (0, 0)))
        grad_hidden, grad_part = block(grad_hidden, num_blocks * width, part)
        grad_head = lax.dynamic_update_slice_in_dim(grad_head, grad_part[:rest], num_blocks * width, axis=0)
    return grad_hidden.reshape(hidden.shape), grad_head


def block_width(tokens: int, vocabulary: int, itemsize: int, multiple: int, block_bytes: int | None) -> int:
    """Columns a block: the fewest blocks whose dz fits the budget, made about equal; a multiple of ``multiple``."""
    if block_bytes is None:
        block_bytes = max(BLOCK_BYTES_LEAST, 4 * tokens * vocabulary // BLOCK_SHARE)
    num_tiles = -(-vocabulary // multiple)
    most = max(1, block_bytes // (itemsize * tokens * multiple))
    return multiple * -(-num_tiles // -(-num_tiles // most))


def wanted_logits(hidden: Array, head: Array, ids: Array, scale: Array) -> Array:
    """[N, K] float32; -inf where the id is not in 0 ... V-1."""

    def one(ids: Array) -> Array:
        rows = jnp.take(head, jnp.clip(ids, 0, head.shape[0] - 1), axis=0).astype(jnp.float32)
        logits = (hidden.astype(jnp.float32) * rows).sum(-1) * scale
        return jnp.where((ids >= 0) & (ids < head.shape[0]), logits, -jnp.inf)

    # One id of every token at a time: the rows of all K at once would be K times the size of hidden.
    return lax.map(one, ids.T).T


def pad_to(array: Array, multiple: int, axis: int) -> Array:
    """Zeros at the end of an axis, up to a multiple."""
    padding = -array.shape[axis] % multiple
    if padding == 0:
        return array
    return jnp.pad(array, [(0, padding if each == axis else 0) for each in range(array.ndim)])


def _flat(hidden: Array, ids: Array, scale: Array | None) -> tuple[Array, Array, Array]:
    tokens = hidden.shape[0] * hidden.shape[1]
    scale = jnp.ones(tokens, jnp.float32) if scale is None else scale.reshape(tokens)
    return hidden.reshape(tokens, -1), ids.reshape(tokens, -1), scale


def _wanted_gradient(wanted: Array, ids: Array, rows: Array, cotangent: Array) -> Array:
    """The whole dz [N, K] at the wanted ids; an id named several times has the sum of its cotangents in each place."""
    _, lse, a, b, c = rows[:, :, None]
    log_p = jnp.where(wanted > -jnp.inf, wanted - lse, 0)

    def one(taken: Array) -> Array:
        return jnp.where(ids == taken[:, None], cotangent, 0).sum(-1)

    return (a - b * log_p) * jnp.exp(log_p) - c + lax.map(one, ids.T).T


def _replace(dz: Array, columns: Array, values: Array, width: int) -> Array:
    columns = jnp.where((columns >= 0) & (columns < width), columns, width)  # out of range: dropped
    # Places that name the same column hold the same value, so their order does not matter.
    return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(dz, columns, values)


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
