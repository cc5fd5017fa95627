"""The host side of one base model: streams get pages, prefill rows and decode slots, round after round.

A *slot* is a decode lane; a *stream* owns pages. A stream that stops (waiting for a search, a partner, its turn) keeps
its pages and gives the slot up; a ready stream takes it. When pages run out, a waiting stream's are taken and its
tokens, which the host has, are cached again when it goes on.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlrag.agents.workflow import Allowed, Sampling
from rlrag.mesh import DATA
from rlrag.model.architecture import Architecture
from rlrag.model.decoding import DecodeWeights
from rlrag.rollout import advance as device
from rlrag.rollout.advance import Decode, Inbox, Outbox, Prefill, Spec
from rlrag.rollout.pages import ROOT, Pages, chain
from rlrag.rollout.sampling import Controls
from rlrag.rollout.stops import StopTable
from rlrag.rollout.streams import LIVE, PENDING, WAITING, CachedStream, Call, Usage


class Decoder:
    """Rollout of one base model on a mesh. Not thread-safe: one dispatch thread drives it."""

    def __init__(self, a: Architecture, spec: Spec, vocabulary: Sequence[bytes], end_id: int, mesh: Mesh, max_stop_states: int = 64):  # fmt: skip # noqa: E501
        self.shards = mesh.shape[DATA]
        check(spec, self.shards)
        self.architecture, self.spec, self.mesh = a, spec, mesh
        # The model's vocabulary may be padded beyond the tokenizer's: padding ids have no bytes.
        padded = list(vocabulary) + [b""] * (a.vocab_size - len(vocabulary))
        self.stops = StopTable(padded, max_stop_states)
        self._stops_on_device: tuple[int, tuple[jax.Array, jax.Array]] | None = None
        self.advance = device.build_advance(spec, a, end_id, mesh)
        with jax.set_mesh(mesh):
            self._cache = jax.jit(lambda: device.empty_cache(a, spec, mesh))()
        self.pages = [Pages(spec.num_pages // self.shards, spec.page_size) for _ in range(self.shards)]
        slots = spec.num_slots // self.shards
        self._slots: list[list[CachedStream | None]] = [[None] * slots for _ in range(self.shards)]
        self._pending: list[deque[CachedStream]] = [deque() for _ in range(self.shards)]
        self._streams: list[dict[CachedStream, None]] = [{} for _ in range(self.shards)]  # oldest first
        self._touched: set[CachedStream] = set()  # got prefill rows this round: their pages are spoken for
        self._outbox: Outbox | None = None
        self._weights: DecodeWeights | None = None
        self._root: jax.Array | None = None
        self.usage = Usage()

    # -- streams ------------------------------------------------------------------------------------------------

    def start(self, weights: DecodeWeights, root: jax.Array) -> None:
        """Begin a rollout with these weights; what older weights cached is forgotten."""
        assert self.idle, "a rollout is still running"
        self._weights, self._root = weights, root
        for pages in self.pages:
            pages.forget_contents()

    def finish(self) -> None:
        """End a rollout: its weights may go while the learner works."""
        self._weights = None

    def open(self, uid: int, shard: int, adapter: str = "") -> CachedStream:
        """A new stream. adapter: the name of the one that reads and writes it; empty: the base."""
        tokens = np.zeros(self.spec.max_tokens, np.int32)
        number = self.architecture.adapters.number(adapter) if adapter else None
        stream = CachedStream(uid, shard, self.spec.max_tokens, tokens, number)
        self._streams[shard][stream] = None
        return stream

    def close(self, stream: CachedStream) -> None:
        self.pages[stream.shard].release(stream.pages)
        stream.pages, stream.cached = [], 0
        del self._streams[stream.shard][stream]

    def submit(self, stream: CachedStream, ticket: Any, stop: tuple[str, ...], limit: int, sampling: Sampling, allowed: Allowed | None) -> bool:  # fmt: skip # noqa: E501
        """Ask for tokens. False when the stream is full or the limit is 0: nothing can be emitted."""
        if stream.length == 0 or stream.status != WAITING:
            what = "has no tokens to go on from" if stream.length == 0 else "is still generating"
            raise ValueError(f"a workflow asked for tokens on a stream that {what}: append a prompt, await the reply")
        ids = self._allowed_ids(sampling, allowed)
        once = allowed is not None and allowed.once
        limit = min(limit, stream.capacity - stream.length)
        if once:
            limit = min(limit, len(ids))
        if limit <= 0:
            return False
        stream.call = Call(ticket, limit, self.stops.start(stop), sampling, ids if allowed else None, once)
        stream.status, stream.since = PENDING, self.usage.rounds
        self._pending[stream.shard].append(stream)
        return True

    def _allowed_ids(self, sampling: Sampling, allowed: Allowed | None) -> list[int]:
        """The distinct allowed ids; ValueError where they, or the filters, do not fit the program."""
        ids, V, K = (
            list(dict.fromkeys(allowed.ids)) if allowed else [],
            self.architecture.vocab_size,
            self.spec.num_kept,
        )
        if allowed and not (ids and min(ids) >= 0 and max(ids) < V):
            raise ValueError(f"allowed ids must lie in 0 ... {V - 1}, got {allowed.ids}")
        wanted = max(sampling.top_k, len(ids), 1 if sampling.top_p < 1 else 0)
        if wanted > K:
            raise ValueError(
                f"sampling needs a filtered set of {wanted} ids (top_k {sampling.top_k}, top_p {sampling.top_p}, "
                f"{len(ids)} allowed), rollout.num_kept is {K}: raise it"
            )
        return ids

    @property
    def idle(self) -> bool:
        return self._outbox is None and not any(self._pending) and not any(any(s) for s in self._slots)

    def load(self, shard: int) -> int:
        """Streams open on a shard."""
        return len(self._streams[shard])

    def abandon(self) -> None:
        """Drop all calls in progress; streams stay open until closed."""
        self._outbox = None
        for shard, slots in enumerate(self._slots):
            self._pending[shard].clear()
            slots[:] = [None] * len(slots)
            for stream in self._streams[shard]:
                stream.status, stream.call = WAITING, None

    # -- rounds -------------------------------------------------------------------------------------------------

    def launch(self) -> bool:
        """Schedule and dispatch one round; False when there is nothing to do. Does not wait for the device."""
        assert self._outbox is None
        if self.idle:
            return False
        begin = time.perf_counter()
        inbox = self._schedule()
        stops, accepting = self._stop_table()
        self.usage.scheduling_s += time.perf_counter() - begin
        if jax.process_count() > 1:  # a program takes numpy arrays in parts only where there is one process
            inbox = jax.device_put(inbox, device.inbox_shardings(self.mesh))
        with jax.set_mesh(self.mesh):
            self._cache, self._outbox = self.advance(self._weights, self._cache, inbox, stops, accepting, self._root)
        return True

    def collect(self) -> list[tuple[CachedStream, Call]]:
        """Wait for the round; the calls that ended in it."""
        assert self._outbox is not None
        begin = time.perf_counter()
        out = Outbox(*jax.device_get(self._outbox))
        self._outbox = None
        self.usage.device_s += time.perf_counter() - begin
        finished = []
        slots_per_shard = self.spec.num_slots // self.shards
        for shard, slots in enumerate(self._slots):
            steps = int(out.steps[shard])
            self.usage.decode_steps += steps
            self.usage.lane_steps += steps * slots_per_shard
            for lane, stream in enumerate(slots):
                if stream is None:
                    continue
                row = shard * slots_per_shard + lane
                self._take(stream, out, row)
                emitted = int(out.count[row])
                self.usage.live_lane_steps += emitted
                self.usage.wasted_lane_steps += steps - emitted
                call = stream.call
                assert call is not None
                if call.reason != device.RUNNING:
                    slots[lane], stream.call = None, None
                    stream.status, stream.since = WAITING, self.usage.rounds
                    finished.append((stream, call))
        self.usage.rounds += 1
        return finished

    def _take(self, stream: CachedStream, out: Outbox, row: int) -> None:
        """Record what a slot emitted."""
        call, n = stream.call, int(out.count[row])
        assert call is not None
        columns = (out.tokens, out.logp, out.entropy, out.certainty, out.margin, out.kept)
        call.parts.append(tuple(column[row, :n].copy() for column in columns))
        call.num_emitted += n
        call.stop_state, call.reason = int(out.stop_state[row]), int(out.reason[row])
        tokens = out.tokens[row, :n]
        if call.once and call.allowed is not None:
            call.allowed = [id for id in call.allowed if id not in tokens]
        # All but the newest are cached: that one goes in with the next step.
        stream.cached = stream.length + n - 1
        stream.append(tokens)
        self._name_pages(stream)

    def _schedule(self) -> Inbox:
        spec, shards = self.spec, self.shards
        inbox = empty_inbox(spec, shards, len(self.architecture.adapters.listed))
        for shard in range(shards):
            before, lanes = list(self._slots[shard]), spec.num_slots // shards
            self._schedule_shard(shard, inbox.prefill, spec.prefill_rows // shards)
            fresh = []
            for lane, stream in enumerate(self._slots[shard]):
                if stream is not None:
                    fill(inbox.decode, shard * lanes + lane, stream)
                    if stream is not before[lane]:
                        fresh.append(lane)
            inbox.decode.fresh[shard * lanes : shard * lanes + len(fresh)] = fresh
            inbox.decode.num_fresh[shard] = len(fresh)
            # A round's own cost is that of about a quarter of a step: slots that stand still longer are worth another.
            inbox.decode.patience[shard] = lanes // 4
        return inbox

    def _schedule_shard(self, shard: int, prefill: Prefill, rows: int) -> None:
        """Give live streams pages for a burst, then waiting calls prefill rows and free slots, in order of arrival."""
        slots, spec = self._slots[shard], self.spec
        self._touched.clear()
        for lane, stream in enumerate(slots):
            if stream is not None and not self._reserve(stream, stream.length + spec.burst):
                # No page is left to take from anyone waiting: the call goes on when others have ended.
                slots[lane] = None
                self._evict(stream)
                stream.status = PENDING
                self._pending[shard].appendleft(stream)
        used = np.zeros(spec.prefill_chunks, np.int32)  # rows per chunk
        ready_chunk: dict[int, int] = {}  # page -> chunk of this round that completes it
        free = deque(lane for lane, stream in enumerate(slots) if stream is None)
        queue, self._pending[shard] = self._pending[shard], deque()
        while queue:
            stream = queue.popleft()
            # Shared pages are taken up first: reserving may overwrite pages that nobody holds.
            chunk = self._share(stream, ready_chunk) if free else 0
            if not free or not self._reserve(stream, stream.length + spec.burst):
                self._pending[shard].append(stream)
                self._pending[shard].extend(queue)
                break
            if self._prefill(stream, chunk, prefill, shard * rows, rows, used, ready_chunk):
                slots[free.popleft()] = stream
                stream.status = LIVE
            else:
                self._pending[shard].append(stream)
        prefill.num_chunks[shard] = int(np.count_nonzero(used))
        if all(stream is None for stream in slots) and not used.any() and self._pending[shard]:
            raise ValueError(
                f"a stream of {self._pending[shard][0].length} tokens does not fit {spec.num_pages // self.shards} "
                f"pages of {spec.page_size}: raise rollout.num_pages"
            )

    def _prefill(self, stream: CachedStream, j: int, prefill: Prefill, first_row: int, rows: int, used: np.ndarray, ready_chunk: dict[int, int]) -> bool:  # fmt: skip # noqa: E501
        """Put the uncached tokens, all but the newest, into rows of chunks from j on. True when all fit this round.

        One chunk may hold many pieces of a stream: a layer writes the keys of all rows before any row reads."""
        C = self.spec.prefill_chunk
        end = stream.length - 1
        while stream.cached < end:
            while j < len(used) and used[j] == rows:
                j += 1
            if j >= len(used):
                return False
            self._touched.add(stream)
            row, count = first_row + int(used[j]), min(C, end - stream.cached)
            prefill.tokens[j, row, :count] = stream.tokens[stream.cached : stream.cached + count]
            prefill.start[j, row], prefill.count[j, row] = stream.cached, count
            prefill.table[j, row, : len(stream.pages)] = stream.pages
            if prefill.adapters is not None and stream.adapter is not None:
                prefill.adapters[j, row, stream.adapter] = 1
            used[j] += 1
            stream.cached += count
            self.usage.prefill_tokens += count
            for page in self._name_pages(stream):
                ready_chunk[page] = j
        return True

    def _share(self, stream: CachedStream, ready_chunk: dict[int, int]) -> int:
        """Take whole cached pages of the same tokens in place of computing them. Returns the first chunk that may read
        them: the one of this very round that completes the last of them, since a layer writes before it reads."""
        size, pages, chunk = self.spec.page_size, self.pages[stream.shard], 0
        while stream.cached == len(stream.names) * size and stream.cached + size <= stream.length - 1:
            number = len(stream.names)
            name = self._name(stream)
            page = pages.share(name)
            if page is None:
                break
            if number < len(stream.pages):
                pages.release([stream.pages[number]])
                stream.pages[number] = page
            else:
                stream.pages.append(page)
            stream.names.append(name)
            stream.cached += size
            self.usage.shared_tokens += size
            chunk = max(chunk, ready_chunk.get(page, 0))
        return chunk

    def _name_pages(self, stream: CachedStream) -> list[int]:
        """Name the pages that have become full; returns them."""
        size, pages, named = self.spec.page_size, self.pages[stream.shard], []
        while (len(stream.names) + 1) * size <= stream.cached:
            number, name = len(stream.names), self._name(stream)
            stream.names.append(name)
            pages.name(stream.pages[number], name)
            named.append(stream.pages[number])
        return named

    def _name(self, stream: CachedStream) -> bytes:
        """Of a stream's next full page: what its adapter, and the tokens up to its end, make of it."""
        size, number = self.spec.page_size, len(stream.names)
        root = ROOT if stream.adapter is None else ROOT + stream.adapter.to_bytes(2, "big")
        return chain(stream.names[-1] if number else root, stream.tokens[number * size : (number + 1) * size])

    def _reserve(self, stream: CachedStream, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, taken from waiting streams if need be."""
        needed = -(-min(num_tokens, stream.capacity) // self.spec.page_size) - len(stream.pages)
        if needed <= 0:
            return True
        pages = self.pages[stream.shard]
        while pages.num_free < needed:
            held = self._touched | {stream}
            idle = [s for s in self._streams[stream.shard] if s.status != LIVE and s.pages and s not in held]
            if not idle:
                return False
            # Waiting streams before pending ones, the youngest first: the oldest are about to go on.
            self._evict(max(idle, key=lambda s: (s.status == WAITING, s.since)))
        taken = pages.take(needed)
        assert taken is not None
        stream.pages += taken
        return True

    def _evict(self, stream: CachedStream) -> None:
        self.pages[stream.shard].release(stream.pages)
        stream.pages, stream.names, stream.cached = [], [], 0
        self.usage.evictions += 1

    def _stop_table(self) -> tuple[jax.Array, jax.Array]:
        if self._stops_on_device is None or self._stops_on_device[0] != self.stops.version:
            replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            # Copies: on CPU the device array may alias the numpy table, which grows.
            arrays = jax.device_put((self.stops.table.copy(), self.stops.accepting.copy()), replicated)
            self._stops_on_device = (self.stops.version, arrays)
        return self._stops_on_device[1]


def empty_inbox(spec: Spec, shards: int, num_adapters: int = 0) -> Inbox:
    """A round in which nothing is done, as numpy arrays to be filled."""
    J, R, C = spec.prefill_chunks, spec.prefill_rows, spec.prefill_chunk

    def adapters(*shape: int) -> np.ndarray | None:
        return np.zeros((*shape, num_adapters), np.float32) if num_adapters else None

    B, n, K = spec.num_slots, spec.pages_per_stream, spec.kept_width
    prefill = Prefill(
        tokens=np.zeros((J, R, C), np.int32), start=np.zeros((J, R), np.int32), count=np.zeros((J, R), np.int32),
        table=np.zeros((J, R, n), np.int32), adapters=adapters(J, R), num_chunks=np.zeros(shards, np.int32),
    )  # fmt: skip
    controls = Controls(
        np.ones(B, np.float32), np.zeros(B, np.int32), np.ones(B, np.float32), np.full((B, K), -1, np.int32)
    )
    decode = Decode(
        token=np.zeros(B, np.int32), position=np.zeros(B, np.int32), limit=np.zeros(B, np.int32),
        table=np.zeros((B, n), np.int32), stop_state=np.zeros(B, np.int32), stream=np.zeros(B, np.uint32),
        once=np.zeros(B, bool), fresh=np.zeros(B, np.int32), num_fresh=np.zeros(shards, np.int32),
        patience=np.zeros(shards, np.int32),
        adapters=adapters(B), controls=controls,
    )  # fmt: skip
    return Inbox(prefill, decode)


def fill(decode: Decode, row: int, stream: CachedStream) -> None:
    """One slot's row of the inbox."""
    call = stream.call
    assert call is not None
    assert stream.cached == stream.length - 1
    decode.token[row] = stream.tokens[stream.length - 1]
    decode.position[row] = stream.length - 1
    decode.limit[row] = call.limit - call.num_emitted
    decode.table[row, : len(stream.pages)] = stream.pages
    decode.stop_state[row] = call.stop_state
    decode.stream[row] = stream.uid
    decode.once[row] = call.once
    if decode.adapters is not None and stream.adapter is not None:
        decode.adapters[row, stream.adapter] = 1
    controls = decode.controls
    controls.temperature[row] = call.sampling.temperature
    controls.top_k[row] = call.sampling.top_k
    controls.top_p[row] = call.sampling.top_p
    if call.allowed is not None:
        controls.allowed[row, : len(call.allowed)] = call.allowed


def check(spec: Spec, shards: int) -> None:
    """Raise ValueError, naming the value over all processes, where the sizes cannot work."""
    processes = jax.process_count()
    for name in ("num_slots", "num_pages", "prefill_rows"):
        value = getattr(spec, name)
        if value % shards or value < shards:
            raise ValueError(
                f"rollout.{name} is {value * processes}: make it a multiple of the {shards * processes} data shard(s)"
            )
    if spec.max_tokens % spec.page_size:
        raise ValueError(f"rollout.max_tokens {spec.max_tokens} is not a multiple of page_size {spec.page_size}")
    if spec.num_pages // shards < spec.pages_per_stream:
        raise ValueError(
            f"rollout.num_pages is {spec.num_pages} over {shards} shard(s), one stream of max_tokens {spec.max_tokens} "
            f"needs {spec.pages_per_stream} pages on its shard: raise num_pages"
        )
