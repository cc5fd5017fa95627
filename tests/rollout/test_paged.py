"""Bursts on the pages themselves play what bursts on a view play, token by token, and never copy the store."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from kernels import interpret
from kernels.decode_attention import api, mosaic_gpu, mosaic_tpu
from kernels.dispatch import Implementation
from rlrag.agents.workflow import Role, Sampling
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Adapters, Architecture
from rlrag.model.decoding import pack
from rlrag.model.parameters import initialize
from rlrag.rollout import advance
from rlrag.rollout.advance import LANES, PAGES
from rlrag.rollout.decoder import Decoder
from rlrag.trajectory import SAMPLED
from tests.rollout.rehearsal import ARCHITECTURE, SPEC, fingerprint, roll_out
from tests.rollout.test_advance import decoder_with

# Local and global layers, grouped queries, two adapters.
RICH = dataclasses.replace(ARCHITECTURE, pattern="LG", window=9, adapters=Adapters(rank=2, names="talker,chooser"))
ROLES = {name: Role("m", adapter=name) for name in ("talker", "chooser")}


def rich_parameters():
    """Sharpened, and with adapters that add something."""
    params = initialize(RICH, jax.random.key(0))
    low = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape) * 0.3, params.adapters)
    return jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim > 1 else leaf, params).replace(adapters=low)


def played(decode: str, **changes):
    return roll_out(4, 2, params=rich_parameters(), a=RICH, roles=ROLES, decode=decode, **changes)


def log_probs(groups) -> np.ndarray:
    streams = [stream for group in groups for trajectory in group.trajectories for stream in trajectory.streams]
    return np.concatenate([span.logp for stream in streams for span in stream.spans if span.act == SAMPLED])


@pytest.fixture(scope="module")
def on_a_view():
    return played(LANES)


@pytest.mark.parametrize(
    "changes",
    [
        {"most_s": 0.01},
        {"num_slots": 3, "burst": 1, "num_pages": 60},  # pages are taken from waiting streams
        {"page_size": 192, "num_pages": 24},  # contiguous: one page a stream
    ],
    ids=["late", "few_pages", "contiguous"],
)
def test_plays_what_a_view_plays(on_a_view, changes):
    groups = played(PAGES, **changes)
    assert fingerprint(groups) == fingerprint(on_a_view)
    np.testing.assert_allclose(log_probs(groups), log_probs(on_a_view), atol=2e-5)


def print_on_four_devices() -> None:
    print(fingerprint(played(PAGES, mesh=make_mesh(2, 2))))


def test_equal_where_pages_are_of_a_shard_and_heads_are_cut(on_a_view, run_on_devices):
    assert run_on_devices(print_on_four_devices, 4).split()[-1] == fingerprint(on_a_view)


def tokens_of(a: Architecture, params, decode: str) -> list[list[int]]:
    """Two calls of different length, with an idle slot beside them at the end."""
    changes = {"num_slots": 2, "num_pages": 12, "page_size": 16, "max_tokens": 64, "prefill_rows": 2}
    spec = dataclasses.replace(SPEC, **changes, prefill_chunk=16, burst=3, num_kept=0, decode=decode)
    decoder = Decoder(a, spec, [b"."] * a.vocab_size, -1, make_mesh())
    decoder.start(pack(params, a), jax.random.key(0))
    sizes = (3, 20)
    for uid, length in enumerate(sizes):
        stream = decoder.open(uid, 0)
        stream.append([(7 * uid + i) % a.vocab_size for i in range(length)])
        decoder.submit(stream, uid, (), 2 + uid, Sampling(temperature=0.0), None)
    emitted = [[] for _ in sizes]
    while decoder.launch():
        for _, call in decoder.collect():
            emitted[call.ticket] = call.emitted()[0].tolist()
    return emitted


@pytest.mark.parametrize("kernel", [mosaic_gpu, mosaic_tpu], ids=["mosaic_gpu", "mosaic_tpu"])
def test_the_kernels_in_the_loop(kernel, monkeypatch):
    """Each kernel in its platform's interpreter, inside the program as it is."""
    a = Architecture(
        vocab_size=32, num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=64, pattern="LG",
        window=9, dtype="bfloat16",
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: leaf * 3, initialize(a, jax.random.key(2)))
    wanted = tokens_of(a, params, LANES)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "blocked", Implementation(kernel.attend, refuses=kernel.refuses))
    with interpret.interpreted():
        assert tokens_of(a, params, PAGES) == wanted
    assert [len(tokens) for tokens in wanted] == [2, 3]


def compiled(num_pages: int) -> tuple[jax.stages.Compiled, tuple]:
    decoder = decoder_with([3], num_pages=num_pages, decode=PAGES)
    stops, accepting = decoder._stop_table()
    with jax.set_mesh(decoder.mesh):
        lowered = decoder.advance.lower(
            decoder._weights, decoder._cache, decoder._schedule(), stops, accepting, decoder._root
        )
    return lowered.compile(), decoder._cache


def test_the_store_is_written_in_place():
    """A copy of it in the loop would cost more than all that a step reads."""
    small, cache = compiled(96)
    large, _ = compiled(960)
    assert small.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    temporary = [each.memory_analysis().temp_size_in_bytes for each in (small, large)]
    assert temporary[0] == temporary[1], "temporaries grow with the pool: it is copied"
    sizes = ",".join(str(size) for size in cache.keys[0].shape)
    copies = re.findall(rf"= f32\[{sizes}\]\S* copy\(.*", small.as_text())
    assert not copies, copies


def test_the_platform_decides_where_nobody_does(monkeypatch):
    assert not SPEC.on_pages
    monkeypatch.setattr(advance, "current_platform", lambda: "cuda")
    assert SPEC.on_pages
    assert not dataclasses.replace(SPEC, decode=LANES).on_pages
