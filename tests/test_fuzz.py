"""Some of tests.fuzz, and that it sees what it is there for: the code is broken in one place at a time."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rlrag import packing
from rlrag.agents.workflow import Episode
from rlrag.rollout import decoder
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine
from rlrag.rollout.pages import Pages
from rlrag.rollout.stops import StopTable
from rlrag.rollout.streams import Call
from tests.fuzz import cases, sayings
from tests.fuzz.cases import run_case
from tests.fuzz.faults import Fault


def test_hostile_episodes_break_nothing():
    seen: Counter = Counter()
    for seed in range(30):
        run_case(seed, 8, seen)
    assert seen["episodes"] == 30 * 8 * 2
    for kind in ("a stop split over bursts", "evictions", "shared tokens", "status: failed", "said: nested tags"):
        assert seen[kind] > 0


def leak(patch):
    patch.setattr(Pages, "release", lambda self, pages: None)


def share_any_page(patch):
    def share(self, name, real=Pages.share):
        found = real(self, name)
        return found if found is not None or not self._by_name else real(self, next(iter(self._by_name)))

    patch.setattr(Pages, "share", share)


def forget_the_stop_state(patch):
    def fill(decode, row, stream, real=decoder.fill):
        real(decode, row, stream)
        decode.stop_state[row] = 0

    patch.setattr(decoder, "fill", fill)


def misname_the_stop(patch):
    patch.setattr(StopTable, "found", lambda self, state: None)


def one_token_more(patch):
    def submit(self, stream, ticket, stop, limit, sampling, allowed, real=Decoder.submit):
        return real(self, stream, ticket, stop, limit + 1, sampling, allowed)

    patch.setattr(Decoder, "submit", submit)


def one_token_less(patch):
    def emitted(self, real=Call.emitted):
        return tuple(column[:-1] for column in real(self))

    patch.setattr(Call, "emitted", emitted)


def evict_and_keep_the_count(patch):
    def evict(self, stream, real=Decoder._evict):
        cached = stream.cached
        real(self, stream)
        stream.cached = cached

    patch.setattr(Decoder, "_evict", evict)


def forget_failed_searches(patch):
    def searched(self, request, found, wait_s, real=Episode.searched):
        status = self.trajectory.status
        real(self, request, found, wait_s)
        self.trajectory.status = status

    patch.setattr(Episode, "searched", searched)


def learn_from_failed_episodes(patch):
    patch.setattr(packing, "LEFT_OUT", ())


def masks_from_padding(patch):
    def pack(*arguments, real=packing.pack):
        packed = real(*arguments)
        return replace(packed, batch=packed.batch.replace(act=(packed.batch.tokens != 0).astype(np.int32)))

    patch.setattr(cases, "pack", pack)


def leave_streams_open(patch):
    patch.setattr(Engine, "_close", lambda self, item: None)


def other_text(patch):
    def build(self, *arguments, real=Engine.__init__, **options):
        real(self, *arguments, **options)
        decode = self.decode
        self.decode = lambda ids: decode(ids).strip()

    patch.setattr(Engine, "__init__", build)


def encode_text_again(patch):
    """A question asked with the policy's own words in it."""

    def generated(self, decoder, stream, call, real=Engine._generated):
        real(self, decoder, stream, call)
        text = self.decode(call.emitted()[0].tolist())
        sayings.Watch.encode(self.decode.__self__, text)

    patch.setattr(Engine, "_generated", generated)


MUTATIONS = [
    leak, share_any_page, forget_the_stop_state, misname_the_stop, one_token_more, one_token_less,
    evict_and_keep_the_count, forget_failed_searches, learn_from_failed_episodes, masks_from_padding,
    leave_streams_open, other_text, encode_text_again,
]  # fmt: skip


def run_cases(seeds):
    for seed in seeds:
        run_case(seed, 8, Counter())


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_broken_code_is_seen(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(Fault):
        run_cases(range(60))
