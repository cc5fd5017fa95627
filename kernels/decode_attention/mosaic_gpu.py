"""Hopper: split-K decode attention (flash-decoding) that copies live pages into shared memory in bulk.

Decode attention is bound by memory: a cached token costs 4H bytes a kv head (bfloat16 key and value) and 4GH flops for
the G queries of the group. All that counts is to keep loads in flight, so the kernel is the plain one:

- A block of the grid is one slot, one kv head and one part of `tokens` tokens. Parts are of one size whatever the
  slot's length, so that the multiprocessors finish together; parts past a slot's end have nothing to do. 128 slots of
  2k tokens over 2 kv heads are 512 blocks of work.
- One warpgroup a block. Keys and values of 64 tokens are a tile, `stages` tiles are on their way at any time, and the
  next is asked for as soon as one is done with; 112 KiB of shared memory at H = 128, so that two blocks share a
  multiprocessor and one computes while the other waits. No producer warp: who asks for a tile does not wait for it.
- The page table stays in device memory. The entry of a tile that is asked for at the end of a turn is read at its
  beginning, so that the latency hides behind the turn's products. Of pages shorter than a tile several are loaded.
- Scores and mixed values are wgmma products, whose least size is 64 rows; the group's queries fill 1 to 16 of them and
  what stands in the others is never written out. At 4.8 TB/s that is about 40 % of the tensor cores' time (H = 128).
  Plain multiply-adds would take two thirds of the vector units at G = 8, on top of the softmax.
- Each part is normalised and written with its log-sum-exp; parts are then merged outside, exp(lse_i - lse) out_i summed
  (Dao et al. 2023, flash-decoding), in float32.

Checked in the GPU interpreter and lowered for CUDA on CPU. Not run on hardware.

Tiles are looked up as "decode_attention", by slots, kv heads, queries of a group, head dim and room for tokens.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import interpret, tiles
from kernels.decode_attention.reference import MASKED

Array = jax.Array

ROWS = 64  # of a wgmma product; queries of a group at most
TILE = 64  # tokens a turn
LOG2E = math.log2(math.e)
# Tokens of a part, a multiple of TILE; tiles under way, of 32 KiB each at H = 128.
TILES = tuple({"tokens": tokens, "stages": stages} for tokens in (512, 1024, 2048) for stages in (2, 3, 4, 6))
DEFAULT = {"tokens": 1024, "stages": 3}


def refuses(dtype: jnp.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int) -> str | None:
    if dtype != jnp.bfloat16:
        return f"the cache is {dtype.name}, wgmma keeps the precision of bfloat16 only"
    if head_dim not in (64, 128):
        return f"head_dim is {head_dim}, not 64 or 128"
    if heads // kv_heads > ROWS:
        return f"{heads // kv_heads} query heads share a kv head, at most {ROWS} fit a wgmma product"
    if page_size % TILE and (page_size % 8 or TILE % page_size):
        return f"page_size is {page_size}, not 8, 16, 32 or a multiple of {TILE}, the tokens of a tile"
    return None


def attend(
    query: Array, keys: Array, values: Array, table: Array, length: Array, *, page_size: int, window: int | None,
    tile: dict[str, int] | None = None,
) -> Array:  # fmt: skip
    """As ``reference.attend``."""
    B, N, H = query.shape
    K = keys.shape[0]
    room = table.shape[1] * page_size
    tile = tile or DEFAULT | tiles.lookup(
        "decode_attention", tiles.device_kind(), slots=B, kv_heads=K, group=N // K, head_dim=H, tokens=room
    )
    tokens, stages = tile["tokens"], tile["stages"]
    assert tokens % TILE == 0, tile
    group = -(-(N // K) // 8) * 8  # rows of shared memory are copied in eights
    q = jnp.pad(query.reshape(B, K, N // K, H), ((0, 0), (0, 0), (0, group - N // K), (0, 0)))
    parts = -(-min(room, window + TILE if window else room) // tokens)

    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    copies = 1 if page_size % TILE == 0 else TILE // page_size  # of a tile
    ring = plgpu.SMEM((stages, TILE, H), keys.dtype, transforms=swizzled)
    loaded = plgpu.Barrier(num_arrivals=2 * copies, num_barriers=stages)
    scratch = plgpu.SMEM((ROWS, H), keys.dtype, transforms=swizzled), ring, ring, plgpu.SMEM((ROWS,), jnp.float32)
    out, lse = plgpu.kernel(
        partial(body, page_size=page_size, window=window, tokens=tokens, stages=stages, group=group),
        out_type=(
            jax.ShapeDtypeStruct((B, parts, K, group, H), keys.dtype),
            jax.ShapeDtypeStruct((B, parts, K, group), jnp.float32),
        ),
        scratch_types=(*scratch, loaded, plgpu.Barrier()),
        grid=(parts, K, B),
        grid_names=("part", "head", "slot"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret.gpu(),
    )(q, keys, values, table, length)
    return merged(out, lse)[:, :, : N // K].reshape(B, N, H).astype(query.dtype)


def merged(out: Array, lse: Array) -> Array:
    """The mean of parts [B, parts, K, G, H] that have seen exp(lse) each; [B, K, G, H] float32."""
    if out.shape[1] == 1:
        return out[:, 0].astype(jnp.float32)
    weights = jax.nn.softmax(lse, axis=1)  # equal where no part has seen anything: the mean of zeros
    return jnp.sum(weights[..., None] * out.astype(jnp.float32), axis=1)


def body(
    q_ref, k_ref, v_ref, table_ref, length_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, loaded, q_loaded,
    *, page_size: int, window: int | None, tokens: int, stages: int, group: int,
) -> None:  # fmt: skip
    """One part of one kv head of one slot."""
    part, head, slot = (lax.axis_index(name) for name in ("part", "head", "slot"))
    H = q_smem.shape[1]
    length = length_ref[slot]
    first = jnp.maximum(length - window, 0) if window else jnp.int32(0)
    begin = lax.div(first, TILE) + part * (tokens // TILE)  # tiles
    count = jnp.maximum(jnp.minimum(lax.div(length + TILE - 1, TILE) - begin, tokens // TILE), 0)

    def places(turn: Array) -> list[Array]:
        """Where in the store the tokens of a turn's tile lie, of each page."""
        token = (begin + turn) * TILE
        if page_size % TILE == 0:
            return [table_ref[slot, lax.div(token, page_size)] * page_size + lax.rem(token, page_size)]
        # Behind the slot's end its last page stands in for those that are not its own.
        last = lax.div(length - 1, page_size)
        numbers = [jnp.minimum(lax.div(token, page_size) + j, last) for j in range(TILE // page_size)]
        return [table_ref[slot, number] * page_size for number in numbers]

    def load(where: list[Array], stage: Array | int) -> None:
        rows = TILE // len(where)
        for j, place in enumerate(where):
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                source, target = ref.at[head, pl.ds(place, rows)], smem.at[stage, pl.ds(j * rows, rows)]
                plgpu.copy_gmem_to_smem(source, target, loaded.at[stage])

    plgpu.copy_gmem_to_smem(q_ref.at[slot, head], q_smem.at[pl.ds(0, group)], q_loaded)
    for stage in range(stages):
        pl.when(stage < count)(lambda stage=stage: load(places(jnp.int32(stage)), stage))
    plgpu.barrier_wait(q_loaded)

    def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, most, sums = carry
        stage = lax.rem(i, stages)
        following = places(jnp.minimum(i + stages, count - 1))
        plgpu.barrier_wait(loaded.at[stage])
        token = (begin + i) * TILE

        def seen(shape: tuple[int, int], dim: int) -> Array:
            position = token + laid_out(lax.broadcasted_iota(jnp.int32, shape, dim), plgpu.Layout.WGMMA)
            return (position >= first) & (position < length)

        @pl.when((token < first) | (token + TILE > length))
        def _clear():  # what is not seen may be anything, NaN too, and zero times NaN is not zero
            value = v_smem[stage]
            v_smem[stage] = jnp.where(seen((TILE, H), 0), value, jnp.zeros_like(value))
            plgpu.commit_smem()

        scores = product(q_smem, k_smem.at[stage], transposed=True)
        # In units of log 2: one multiplication fewer for every exponential.
        scores = jnp.where(seen((ROWS, TILE), 1), scores * LOG2E, MASKED)
        new_most = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_most, scores.shape, [0]))
        kept = jnp.exp2(most - new_most)
        sums = sums * kept + weights.sum(axis=1)
        mixed = product(weights.astype(v_smem.dtype), v_smem.at[stage])
        total = total * lax.broadcast_in_dim(kept, total.shape, [0]) + mixed
        plgpu.commit_smem()  # every warp has read the tile before the next is written over it

        @pl.when(i + stages < count)
        def _load():
            load(following, stage)

        return total, new_most, sums

    rows = plgpu.Layout.WGMMA.reduce(1)
    start = (
        laid_out(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
        laid_out(jnp.full((ROWS,), MASKED, jnp.float32), rows),
        laid_out(jnp.zeros((ROWS,), jnp.float32), rows),
    )
    total, most, sums = lax.fori_loop(0, count, turn, start)
    divisor = jnp.where(sums > 0, sums, 1.0)
    q_smem[...] = (total / lax.broadcast_in_dim(divisor, total.shape, [0])).astype(q_smem.dtype)
    lse_smem[...] = jnp.where(sums > 0, most / LOG2E + jnp.log(divisor), MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, group)], out_ref.at[slot, part, head])
    plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, group)], lse_ref.at[slot, part, head])
    plgpu.wait_smem_to_gmem(0)


# The interpreter of JAX 0.10.2 knows neither layouts, transposed references nor operands in registers: there a product
# is a product of arrays.


def laid_out(x: Array, layout: Any) -> Array:
    return x if interpret.active() else plgpu.layout_cast(x, layout)


def product(left: Any, right: Any, transposed: bool = False) -> Array:
    """left [M, k] (shared memory or registers) times right [k, n], or [n, k] transposed, in shared memory; float32."""
    if interpret.active():
        dims = ((1,), (1 if transposed else 0,)), ((), ())
        return lax.dot_general(left[...], right[...], dims, preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, left, right.T if transposed else right)
        return accumulator[...]

    n = right.shape[0 if transposed else 1]
    accumulator = plgpu.ACC  # type: ignore[attr-defined]  # public, and not in the module's list
    return pl.run_scoped(multiply, accumulator((left.shape[0], n), jnp.float32))
