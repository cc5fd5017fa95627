"""The double of the device program: scripts for logits, token ids for a cache."""

import random
from collections import Counter

import numpy as np

from rlrag.agents.tokenizer import Tokenizer
from rlrag.rollout.advance import ENDED, LIMITED, RUNNING, STOPPED, Inbox, Outbox
from rlrag.rollout.decoder import Decoder
from tests.fuzz.faults import expect
from tests.fuzz.sayings import say


class Double:
    """advance(weights, cache, inbox, stops, accepting, root) with scripts for logits and token ids for a cache."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, seed: int, seen: Counter):
        self.decoder, self.tokenizer, self.seed, self.seen = decoder, tokenizer, seed, seen
        self.store = np.full(decoder.spec.num_pages * decoder.spec.page_size, -1, np.int64)
        self.said: dict[tuple[int, int], list[int]] = {}  # (stream, first position) -> what was emitted

    def script(self, uid: int, start: int) -> list[int]:
        """Depends on the stream and the place in it alone, not on slots, bursts and pages."""
        dice = random.Random(f"{self.seed} {uid} {start}")
        return say(self.tokenizer, dice, Counter() if (uid, start) in self.said else self.seen)

    def __call__(self, weights, cache, inbox: Inbox, stops, accepting, root):
        self.prefill(inbox)
        return cache, self.burst(inbox, np.asarray(stops), np.asarray(accepting))

    def place(self, table: np.ndarray, position: int) -> int:
        size = self.decoder.spec.page_size
        return int(table[position // size]) * size + position % size

    def prefill(self, inbox: Inbox) -> None:
        p = inbox.prefill
        for j in range(int(p.num_chunks[0])):
            for r in range(p.tokens.shape[1]):
                for n in range(int(p.count[j, r])):
                    self.store[self.place(p.table[j, r], int(p.start[j, r]) + n)] = p.tokens[j, r, n]

    def burst(self, inbox: Inbox, stops: np.ndarray, accepting: np.ndarray) -> Outbox:
        spec, d = self.decoder.spec, inbox.decode
        B, N = spec.num_slots, spec.burst
        out = Outbox(
            np.zeros((B, N), np.int32), *(np.zeros((B, N), np.float32) for _ in range(4)),
            np.full((B, N, spec.num_kept), -1, np.int32), np.zeros(B, np.int32), np.full(B, LIMITED, np.int32),
            d.stop_state.copy(), np.zeros(1, np.int32),
        )  # fmt: skip
        streams = {stream.uid: stream for stream in self.decoder._streams[0]}
        for lane in range(B):
            if d.limit[lane]:
                self.decode(lane, d, streams[int(d.stream[lane])], stops, accepting, out)
        out.steps[0] = out.count.max()
        return out

    def decode(self, lane: int, d, stream, stops, accepting, out: Outbox) -> None:
        position, uid = int(d.position[lane]), stream.uid
        for at in range(position):  # everything this lane attends to is its own
            held = self.store[self.place(d.table[lane], at)]
            expect(held == stream.tokens[at], f"stream {uid} attends to {held} at {at}, its own is {stream.tokens[at]}")
        start = position + 1 - stream.call.num_emitted
        script = self.script(uid, start)
        said = self.said.setdefault((uid, start), [])
        expect(len(said) == stream.call.num_emitted, f"stream {uid} forgot {len(said)} emitted tokens")
        token, state, reason = int(d.token[lane]), int(d.stop_state[lane]), RUNNING
        allowed = [int(id) for id in d.controls.allowed[lane] if id >= 0]
        for n in range(min(self.decoder.spec.burst, int(d.limit[lane]))):
            self.store[self.place(d.table[lane], position + n)] = token
            token = script[len(said)] if len(said) < len(script) else self.tokenizer.end_id
            if allowed:
                token = allowed[token % len(allowed)]
                out.kept[lane, n, : len(allowed)] = allowed
                if d.once[lane]:
                    allowed.remove(token)
            said.append(token)
            state = int(stops[state, token])
            out.tokens[lane, n], out.logp[lane, n], out.entropy[lane, n] = token, -1 / (1 + token), 1 / (1 + n + start)
            out.count[lane] = n + 1
            if accepting[state]:
                reason = STOPPED
            elif token == self.tokenizer.end_id:
                reason = ENDED
            elif n + 1 == d.limit[lane]:
                reason = LIMITED
            if reason != RUNNING:
                break
        if reason == STOPPED and n == 0 and len(said) > 1:
            self.seen["a stop split over bursts"] += 1
        out.stop_state[lane], out.reason[lane] = state, reason
