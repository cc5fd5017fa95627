"""The device program of a round: in place, bounded, and ending with its slots."""

import dataclasses

import jax
import numpy as np
import pytest

from rlrag.agents.workflow import Sampling
from rlrag.mesh import make_mesh
from rlrag.model.decoding import pack
from rlrag.rollout.decoder import Decoder
from tests.rollout.rehearsal import ARCHITECTURE, SPEC, VOCABULARY, parameters


def decoder_with(limits: list[int], **changes) -> Decoder:
    """A decoder asked for one call of each limit."""
    decoder = Decoder(ARCHITECTURE, dataclasses.replace(SPEC, **changes), VOCABULARY, -1, make_mesh())
    decoder.start(pack(parameters(), ARCHITECTURE), jax.random.key(0))
    for uid, limit in enumerate(limits):
        stream = decoder.open(uid, 0)
        stream.append(range(1, 10))
        decoder.submit(stream, uid, (), limit, Sampling(), None)
    return decoder


def compiled(num_pages: int):
    decoder = decoder_with([3], num_pages=num_pages)
    stops, accepting = decoder._stop_table()
    with jax.set_mesh(decoder.mesh):
        lowered = decoder.advance.lower(
            decoder._weights, decoder._cache, decoder._schedule(), stops, accepting, decoder._root
        )
    return lowered.compile().memory_analysis(), decoder._cache


def test_the_cache_is_updated_in_place():
    small, cache = compiled(96)
    large, _ = compiled(960)
    assert small.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert large.temp_size_in_bytes == small.temp_size_in_bytes, "temporaries grow with the pool: it is copied"


@pytest.mark.parametrize(("limits", "steps"), [([2, 1], 2), ([9, 1], 3), ([9, 3], 5), ([5, 5], 5)])
def test_a_burst_ends_with_its_last_slot_or_with_its_patience(limits, steps):
    """Of eight slots: the two steps that one may stand still are over one step later."""
    decoder = decoder_with(limits)
    assert decoder.launch()
    finished = decoder.collect()
    assert decoder.usage.decode_steps == steps
    assert decoder.usage.live_lane_steps == sum(min(limit, steps) for limit in limits)
    waste = sum(steps - min(limit, steps) for limit in limits)
    assert decoder.usage.wasted_lane_steps == waste
    assert sorted(call.ticket for _, call in finished) == [i for i, limit in enumerate(limits) if limit <= steps]


def test_a_prompt_may_take_several_rounds():
    """What does not fit a round goes on in the next."""
    decoder = Decoder(ARCHITECTURE, dataclasses.replace(SPEC, prefill_rows=2), VOCABULARY, -1, make_mesh())
    decoder.start(pack(parameters(), ARCHITECTURE), jax.random.key(0))
    for uid, length in enumerate((120, 4)):
        stream = decoder.open(uid, 0)
        stream.append((np.arange(length) % 20).tolist())
        decoder.submit(stream, uid, (), 3, Sampling(), None)
    order = []
    while decoder.launch():
        order += [call.ticket for _, call in decoder.collect()]
    assert order == [0, 1]
    # 119 tokens in 20 pieces of 6, two of them in each of the 4 chunks of a round; the short prompt is with the last.
    assert decoder.usage.rounds == 3
    assert decoder.usage.prefill_tokens == 119 + 3
