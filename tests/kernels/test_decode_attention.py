"""Every implementation against float64, on stores that are NaN wherever no slot may look; and that the kernels of other
platforms lower for them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import arg_specs, dispatch, interpret, tuning
from kernels.decode_attention import blocked, decode_attention, mosaic_gpu, mosaic_tpu
from kernels.decode_attention.api import IMPLEMENTATIONS

PLAIN, KERNELS = ("reference", "blocked"), ("mosaic_gpu", "mosaic_tpu")


class Case(NamedTuple):
    """A store and who looks at it; the smallest sizes that cross pages, tiles of 64, parts and the ring of tiles."""

    lengths: tuple[int, ...] = (0, 1, 63, 64, 65, 190)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    pages: int = 12  # of a slot
    window: int | None = None
    scale: float | None = None
    shared: int = 0  # pages that all slots begin with
    loud: float = 1.0  # times the query

    def arrays(self, dtype) -> tuple:
        """query, keys, values, table and length; NaN in every place that no slot sees."""
        dice = np.random.default_rng(0)
        slots, size = len(self.lengths), self.page_size
        table = dice.permutation(slots * self.pages + 1)[: slots * self.pages].reshape(slots, self.pages)
        table[:, : self.shared] = table[0, : self.shared]
        seen = np.zeros((slots * self.pages + 1) * size, bool)
        for row, length in zip(table, self.lengths):
            seen[self.places(row, length)] = True
        shape = self.kv_heads, len(seen), self.head_dim
        keys, values = (np.where(seen[:, None], dice.normal(size=shape), np.nan) for _ in range(2))
        query = dice.normal(size=(slots, self.heads, self.head_dim)) * self.loud
        stores = (jnp.asarray(each, dtype) for each in (query, keys, values))
        return *stores, table.astype(np.int32), np.array(self.lengths, np.int32)

    def places(self, row: np.ndarray, length: int) -> np.ndarray:
        first = max(0, length - self.window) if self.window else 0
        positions = np.arange(first, length)
        return row[positions // self.page_size] * self.page_size + positions % self.page_size

    def expected(self, query, keys, values, table, length) -> np.ndarray:
        """Slot by slot and head by head, in float64."""
        query, keys, values = (np.asarray(each, np.float64) for each in (query, keys, values))
        out = np.zeros_like(query)
        for slot, (row, number) in enumerate(zip(table, length)):
            places = self.places(row, number)
            for head in range(self.heads if number else 0):
                own = head * self.kv_heads // self.heads
                scores = keys[own, places] @ query[slot, head] * (self.scale or self.head_dim**-0.5)
                weights = np.exp(scores - scores.max())
                out[slot, head] = weights @ values[own, places] / weights.sum()
        return out

    def run(self, name: str, arguments: tuple) -> np.ndarray:
        call = partial(
            decode_attention, page_size=self.page_size, window=self.window, scale=self.scale, implementation=name
        )
        if name not in KERNELS:
            return jax.jit(call)(*arguments)
        with interpret.interpreted():
            return jax.jit(call)(*arguments)


CASES = {
    "ragged": Case(),
    "window": Case(window=70, scale=0.25),
    "short pages": Case(page_size=8, pages=24, lengths=(8, 65, 190)),
    "long pages, one head": Case(page_size=128, pages=2, lengths=(0, 128, 129), heads=3, kv_heads=1),
    "contiguous": Case(page_size=320, pages=1, lengths=(0, 3, 320), window=40),
    "shared prefix, odd group": Case(shared=3, lengths=(48, 49, 60, 100), heads=14),
    "loud": Case(loud=100.0, lengths=(65, 190)),
}
PER_KERNEL = ("ragged", "short pages", "contiguous", "shared prefix, odd group", "loud")


def check(case: Case, name: str, dtype) -> None:
    arguments = case.arrays(dtype)
    got = np.asarray(case.run(name, arguments), np.float64)
    # Half of bfloat16's spacing is 0.4 % of a value of up to 4, of each weight too.
    tolerance = dict(atol=0.02, rtol=0.02) if dtype == jnp.bfloat16 else dict(atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(got, case.expected(*arguments), **tolerance)
    assert not got[np.array(case.lengths) == 0].any(), "an idle slot gives zeros"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PLAIN)
def test_equals_float64(name, case, dtype):
    check(case, name, dtype)


@pytest.mark.parametrize("case", PER_KERNEL)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_float64(name, case, monkeypatch):
    """One part a slot, so that a slot's tiles outnumber the stages."""
    monkeypatch.setitem(mosaic_gpu.DEFAULT, "stages", 2)
    dtype = jnp.float32 if (name, case) == ("mosaic_tpu", "short pages") else jnp.bfloat16
    check(CASES[case], name, dtype)


@pytest.mark.parametrize("case", ["ragged", "window"])
def test_parts_are_merged(case):
    """As short as the table of tiles says."""
    with tuning.answered({"tokens": 64}) as asked:
        check(CASES[case], "mosaic_gpu", jnp.bfloat16)
    assert asked == {("decode_attention", "group=2 head_dim=64 kv_heads=2 slots=8 tokens=256")}


def test_the_memory_model_of_tpu_finds_no_race():
    case = Case(lengths=(0, 20), pages=2)
    arguments = case.arrays(jnp.bfloat16)
    with interpret.interpreted(tpu_memory=True):
        call = partial(decode_attention, page_size=case.page_size, implementation="mosaic_tpu")
        got = jax.jit(call)(*arguments)
    np.testing.assert_allclose(np.asarray(got, np.float64), case.expected(*arguments), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("block_tokens", [1, 5, 16, 24, 1000])
def test_blocks_of_any_size(block_tokens):
    case = CASES["window"]
    query, *others = case.arrays(jnp.float32)
    attend = partial(blocked.attend, page_size=case.page_size, window=case.window, block_tokens=block_tokens)
    got = jax.jit(attend)(query * case.scale, *others)
    np.testing.assert_allclose(got, case.expected(query, *others), atol=2e-5, rtol=1e-5)


def test_blocked_needs_no_room_for_what_might_be_read():
    """Temporaries are of a block, not of all the pages a slot may have."""

    def temporary(pages: int) -> int:
        case = Case(pages=pages)
        call = partial(decode_attention, page_size=case.page_size, implementation="blocked")
        return jax.jit(call).lower(*case.arrays(jnp.float32)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(96) == temporary(12)


def lowered(name: str, platform: str, spec: arg_specs.DecodeSpec, page_size: int = 64, **tile) -> str:
    shape = jax.ShapeDtypeStruct
    store = shape((spec.kv_heads, 2 * spec.longest, spec.head_dim), jnp.bfloat16)
    query = shape((spec.slots, spec.heads, spec.head_dim), jnp.bfloat16)
    table, length = shape((spec.slots, spec.longest // page_size), jnp.int32), shape((spec.slots,), jnp.int32)
    attend = jax.jit(partial(IMPLEMENTATIONS[name].run, page_size=page_size, window=None, **tile))
    return attend.trace(query, store, store, table, length).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("spec", arg_specs.DECODES, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("name", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")])
def test_kernels_lower_for_their_platform(name, platform, spec):
    """Real shapes. What the interpreter does not see: layouts, shared memory's swizzles, operands of wgmma."""
    text = lowered(name, platform, spec)
    assert "custom_call @" + {"cuda": "mosaic_gpu", "tpu": "tpu_custom_call"}[platform] in text


@pytest.mark.parametrize("tile", [mosaic_gpu.TILES[0], mosaic_gpu.TILES[-1]], ids=str)
def test_tiles_that_are_tried_fit(tile):
    """At H = 128, where shared memory is shortest; and the bench finds them."""
    assert "mosaic_gpu" in lowered("mosaic_gpu", "cuda", arg_specs.DECODES[1], tile=tile)
    assert tuning.tileable("cuda")["decode_attention"] == {"mosaic_gpu": mosaic_gpu}


@pytest.mark.parametrize(
    ("refuses", "change", "reason"),
    [
        (mosaic_gpu.refuses, {}, None),
        (mosaic_gpu.refuses, {"dtype": jnp.dtype("float32")}, "float32"),
        (mosaic_gpu.refuses, {"head_dim": 32}, "head_dim is 32"),
        (mosaic_gpu.refuses, {"heads": 130}, "65 query heads"),
        (mosaic_gpu.refuses, {"page_size": 96}, "page_size is 96"),
        (mosaic_gpu.refuses, {"page_size": 4}, "page_size is 4"),
        (mosaic_tpu.refuses, {}, None),
        (mosaic_tpu.refuses, {"page_size": 24}, "multiple of 16"),
        (mosaic_tpu.refuses, {"page_size": 24, "dtype": jnp.dtype("float32")}, None),
    ],
)
def test_what_the_kernels_refuse(refuses, change, reason):
    fits = dict(dtype=jnp.dtype(jnp.bfloat16), heads=14, kv_heads=2, head_dim=64, page_size=64)
    found = refuses(**(fits | change))
    assert found is None if reason is None else reason in found


def test_nothing_unmeasured_is_chosen():
    sizes = dict(dtype=jnp.dtype(jnp.bfloat16), heads=14, kv_heads=2, head_dim=64, page_size=64)
    choice = dispatch.choose("decode_attention", IMPLEMENTATIONS, None, **sizes)
    assert (choice.default, choice.exceptions) == ("blocked", ())


def test_wrong_arguments_name_the_values():
    query, keys, values, table, length = Case().arrays(jnp.float32)
    call = partial(decode_attention, page_size=16)
    with pytest.raises(ValueError, match=r"\[K, P \* 24, H\]"):
        decode_attention(query, keys, values, table, length, page_size=24)
    with pytest.raises(ValueError, match="N a multiple of K"):
        call(query[:, :3], keys, values, table, length)
    with pytest.raises(ValueError, match="with B = 6"):
        call(query, keys, values, table[:5], length)
    with pytest.raises(ValueError, match="one dtype"):
        call(query.astype(jnp.bfloat16), keys, values, table, length)
    with pytest.raises(ValueError, match="runs on cuda"):
        call(query, keys, values, table, length, implementation="mosaic_gpu")
