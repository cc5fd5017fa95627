"""The product that both Hopper kernels of log_prob are built on: tiles of hidden @ head^T, left in registers.

A program has three warpgroups. One issues bulk copies of tiles of hidden [2 block_m, 64] and head [block_n, 64] into
``stages`` places of shared memory and waits for nothing but a free place, so that copies run on from one tile of the
vocabulary into the next. Two multiply, each its block_m tokens with the same block_n vocabulary entries, and hand the
logits to the caller as an array in registers: what becomes of them never passes through memory unless the caller
writes it.

A program works on one row block (2 block_m tokens) and one of ``splits`` shares of the vocabulary. Programs are
numbered so that those running at one time are few row blocks in all splits: their rows of hidden, read again for
every tile, stay in the second-level cache, and the head is read from memory once for each such group of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import interpret

Array = jax.Array

BLOCK_K = 64  # of D: one row of a tile is then 128 bytes, the widest swizzle
COMPUTE, MEMORY = 2, 2  # number of multiplying warpgroups; index of the one that copies
PROGRAMS_INTERPRETED = 3  # stands for the number of multiprocessors where there is none
SWIZZLE = (plgpu.TilingTransform((8, BLOCK_K)), plgpu.SwizzleTransform(128))  # of bfloat16, BLOCK_K columns wide


class Tiling(NamedTuple):
    """How a product of hidden [N, D] and head [V, D] is cut; N a multiple of 2 block_m, V >= block_n one of 8."""

    block_m: int  # tokens of a warpgroup
    block_n: int  # vocabulary entries of a tile
    stages: int  # places for tiles in shared memory
    num_rows: int  # row blocks
    num_tiles: int  # of the vocabulary; the last one ends with it and may overlap the one before
    splits: int  # shares of the vocabulary

    def edge(self, split: Any) -> Any:
        """The first tile of a split."""
        return split * self.num_tiles // self.splits

    def start(self, tile: Array, vocabulary: int) -> Array:
        """The first vocabulary entry of a tile."""
        return jnp.minimum(tile * self.block_n, vocabulary - self.block_n)


def tiling(tokens: int, vocabulary: int, block_m: int, block_n: int, stages: int) -> Tiling:
    """The tiling with the fewest splits that keeps multiprocessors busy: within 4 %, or as nearly as can be, of waves
    of programs that are all full."""
    num_rows, num_tiles = tokens // (COMPUTE * block_m), -(-vocabulary // block_n)
    programs = num_programs()

    def idle(splits: int) -> tuple[float, int]:
        waves = -(-num_rows * splits // programs)
        return max(1.04, waves * programs / (num_rows * splits)), splits

    splits = min(range(1, min(num_tiles, programs) + 1), key=idle)
    return Tiling(block_m, block_n, stages, num_rows, num_tiles, splits)


def num_programs() -> int:
    """How many programs run at one time: one a multiprocessor, for each needs most of its shared memory."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else PROGRAMS_INTERPRETED


# (row block, split, its first tile, one past its last, tile -> logits [block_m, block_n] float32 in registers)
Compute = Callable[[Array, Array, Array, Array, Callable[[Array], Array]], None]


def program(cut: Tiling, hidden_ref: Any, head_ref: Any, places: "Places", compute: Compute) -> None:
    """The body of one program: copies in one warpgroup, ``compute`` in each of the other two."""
    width = -(-num_programs() // cut.splits)  # row blocks that run at one time
    row, split = plgpu.planar_snake(lax.axis_index("program"), (cut.num_rows, cut.splits), 0, width)
    first, last = cut.edge(split), cut.edge(split + 1)
    group = lax.axis_index("warpgroup")
    num_steps = hidden_ref.shape[1] // BLOCK_K

    @pl.when(group == MEMORY)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(row * COMPUTE * cut.block_m, COMPUTE * cut.block_m)

        def step(index: Array, _: None) -> None:
            place = lax.rem(index, cut.stages)
            pl.when(index >= cut.stages)(lambda: plgpu.barrier_wait(places.empty.at[place]))
            columns = pl.ds(lax.rem(index, num_steps) * BLOCK_K, BLOCK_K)
            start = cut.start(first + lax.div(index, num_steps), head_ref.shape[0])
            entries = pl.ds(pl.multiple_of(start, 8), cut.block_n)
            full = places.full.at[place]
            plgpu.copy_gmem_to_smem(hidden_ref.at[rows, columns], places.hidden.at[place], full)
            plgpu.copy_gmem_to_smem(head_ref.at[entries, columns], places.head.at[place], full)

        total = (last - first) * num_steps
        lax.fori_loop(0, total, step, None)

        def rest(index: Array, _: None) -> None:  # a program leaves no barrier half way
            plgpu.barrier_wait(places.empty.at[lax.rem(index, cut.stages)])

        lax.fori_loop(jnp.maximum(total - cut.stages, 0), total, rest, None)

    @pl.when(group != MEMORY)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(group * cut.block_m, cut.block_m)

        def logits(tile: Array) -> Array:
            def product(accumulator: Any) -> Array:
                before = (tile - first) * num_steps

                def step(index: Array, _: None) -> None:
                    place = lax.rem(before + index, cut.stages)
                    plgpu.barrier_wait(places.full.at[place])
                    head = places.head.at[place].transpose((1, 0))
                    plgpu.wgmma(accumulator, places.hidden.at[place, rows], head)
                    plgpu.wgmma_wait(1)  # the one before is done, and its place free
                    done = lax.rem(before + index + cut.stages - 1, cut.stages)
                    pl.when(index > 0)(lambda: plgpu.barrier_arrive(places.empty.at[done]))

                lax.fori_loop(0, num_steps, step, None)
                found = accumulator[...]  # waits for the last one
                plgpu.barrier_arrive(places.empty.at[lax.rem(before + num_steps - 1, cut.stages)])
                return found

            return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((cut.block_m, cut.block_n), jnp.float32))

        compute(row, split, first, last, logits)


class Places(NamedTuple):
    """Shared memory and barriers of a program; ``places`` describes them, the kernel receives them."""

    hidden: Any  # [stages, 2 block_m, 64]
    head: Any  # [stages, block_n, 64]
    rows: Any  # [2, R, block_m] float32: numbers of each token
    out: Any
    full: Any  # copies have come, per place
    empty: Any  # both multiplying warpgroups have read, per place
    rows_full: Any  # per warpgroup


def call(kernel: Callable[..., None], cut: Tiling, shape: jax.ShapeDtypeStruct, dtype: Any, num: int, out: Any) -> Any:
    """kernel(hidden, head, numbers of tokens [num, N], result, Places) as a function of the first three.

    Args:
      shape: of the result.
      dtype: of hidden and head.
      num: numbers that each token brings along.
      out: the shared memory from which results are copied.
    """
    tiles = [(COMPUTE * cut.block_m, BLOCK_K), (cut.block_n, BLOCK_K)]
    places = Places(
        *(plgpu.SMEM((cut.stages, *tile), dtype, transforms=SWIZZLE) for tile in tiles),
        rows=plgpu.SMEM((COMPUTE, num, cut.block_m), jnp.float32),
        out=out,
        full=plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
        empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=cut.stages),
        rows_full=plgpu.Barrier(num_arrivals=num, num_barriers=COMPUTE),
    )

    def body(hidden_ref: Any, head_ref: Any, rows_ref: Any, out_ref: Any, *scratch: Any) -> None:
        kernel(hidden_ref, head_ref, rows_ref, out_ref, Places(*scratch))

    return plgpu.kernel(
        body,
        out_type=shape,
        scratch_types=list(places),
        grid=(cut.num_rows * cut.splits,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        # Named because the default has changed between versions; approximate: exp2 in one instruction, to 2 ulp.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret.gpu(),
    )


def row_numbers(rows_ref: Any, tokens: Any, places: Places) -> list[Array]:
    """The [block_m] float32 arrays of a warpgroup's tokens, one for each of the numbers a token brings along."""
    group, num = lax.axis_index("warpgroup"), rows_ref.shape[0]
    for index in range(num):
        plgpu.copy_gmem_to_smem(rows_ref.at[index, tokens], places.rows.at[group, index], places.rows_full.at[group])
    plgpu.barrier_wait(places.rows_full.at[group])
    return [places.rows[group, index] for index in range(num)]
