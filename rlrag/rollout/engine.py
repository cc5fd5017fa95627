"""The engine: many workflow generators, one jitted program a round.

Each cycle asks the running episodes for their next requests, hands generations to the decoder of the role's model,
searches and tools to host threads, and plays one round on every model that has work. A waiting episode costs nothing
but its pages. Nothing here knows what a reward is.
"""

import hashlib
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from rlrag.agents.workflow import Episode, Force, Found, Generate, Mode, Reply, Role, Search, Tool, Workflow, call_tool
from rlrag.model.decoding import DecodeWeights
from rlrag.rollout.advance import ENDED, STOPPED
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.streams import CachedStream, Call, Usage
from rlrag.trajectory import SAMPLED, Example, Group, Passage, Span, Stream


class Searcher(Protocol):
    """What the engine asks of a retriever (rlrag.retrieval.client implements it)."""

    def search(
        self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None
    ) -> list[list[Passage]]: ...


def counted(searcher: Searcher | None) -> dict[str, float]:
    """What a retriever has counted since its start, where it counts."""
    return getattr(searcher, "metrics", dict)()


@dataclass(frozen=True)
class Play:
    """Everything a rollout needs beside weights and examples."""

    workflow: Workflow
    roles: Mapping[str, Role]
    mode: Mode = "train"
    group_size: int = 1
    version: int = 0
    tools: Mapping[str, Callable] = field(default_factory=dict)


@dataclass
class EngineUsage:
    """Counts and seconds of one rollout, beside the decoders' own."""

    episodes: int = 0
    searches: int = 0
    search_batches: int = 0
    search_s: float = 0.0  # summed over queries: request to reply
    starved_s: float = 0.0  # nothing to decode: every running episode waits for the host threads
    workflow_s: float = 0.0  # inside workflow generators
    seconds: float = 0.0
    decoders: dict[str, Usage] = field(default_factory=dict)
    retriever: dict[str, float] = field(default_factory=dict)  # what it counted meanwhile, and its latency now

    def metrics(self) -> dict[str, float]:
        total = {name: sum(getattr(u, name) for u in self.decoders.values()) for name in Usage.__dataclass_fields__}
        lane_steps = max(total["lane_steps"], 1)
        return {
            "tokens_per_s": total["live_lane_steps"] / max(self.seconds, 1e-9),
            "tokens": total["live_lane_steps"],
            "rounds": total["rounds"],
            "lane_occupancy": total["live_lane_steps"] / lane_steps,
            "burst_waste": total["wasted_lane_steps"] / lane_steps,
            "prefill_tokens": total["prefill_tokens"],
            "shared_tokens": total["shared_tokens"],
            "evictions": total["evictions"],
            "device_s": total["device_s"],
            "scheduling_s": total["scheduling_s"],
            "workflow_s": self.workflow_s,
            "starved_s": self.starved_s,
            "search_wait_s": self.search_s / max(self.searches, 1),
            "searches_per_batch": self.searches / max(self.search_batches, 1),
            **{f"retriever/{name}": value for name, value in self.retriever.items()},
        }


@dataclass(eq=False)
class _Running:
    """An episode in flight."""

    index: int  # of its group
    episode: Episode
    shard: int
    streams: dict[str, tuple[Role, CachedStream]] = field(default_factory=dict)  # name -> (who began it, cache)


@dataclass(frozen=True)
class _Ticket:
    running: _Running
    number: int
    request: Any
    asked: float = 0.0


def stream_uid(example_id: str, sample: int, stream: str) -> int:
    """uint32 naming a stream in sampling keys, the same wherever and whenever it runs."""
    return int.from_bytes(hashlib.blake2b(f"{example_id}\0{sample}\0{stream}".encode(), digest_size=4).digest(), "big")


class Engine:
    """Runs episodes on the decoders of one or several base models."""

    def __init__(
        self,
        decoders: Mapping[str, Decoder],
        decode: Callable[[Sequence[int]], str],
        searcher: Searcher | None = None,
        *,
        max_episodes: int,
        search_threads: int = 64,
        search_batch: int = 64,
    ):
        """decode turns token ids into text for workflows; max_episodes are in flight at once; a search call takes up
        to search_batch queries, search_threads calls overlap."""
        self.decoders = dict(decoders)
        self.decode = decode
        self.searcher = searcher
        self.max_episodes = max_episodes
        self.search_batch = search_batch
        self._threads = ThreadPoolExecutor(search_threads, thread_name_prefix="search")
        self._done: queue.SimpleQueue[tuple[list[_Ticket], list[Any]]] = queue.SimpleQueue()
        self._outstanding = 0  # requests on host threads
        self._ready: list[_Running] = []  # episodes that may have new requests
        self.usage = EngineUsage()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def run(
        self, weights: Mapping[str, DecodeWeights], examples: Sequence[Example], play: Play, root: jax.Array
    ) -> Iterator[Group]:
        """Play `group_size` episodes of every example; groups come in example order, each as soon as it and those
        before it are complete. root: the sampling key of this rollout."""
        self.usage = EngineUsage()
        begin = time.perf_counter()
        before = {name: Usage(**vars(decoder.usage)) for name, decoder in self.decoders.items()}
        counted_before = counted(self.searcher)
        for name, decoder in self.decoders.items():
            decoder.start(weights[name], root)
        shards = min(decoder.shards for decoder in self.decoders.values())
        waiting = iter([(index, sample) for index in range(len(examples)) for sample in range(play.group_size)])
        finished: list[list[_Running]] = [[] for _ in examples]
        running: dict[_Running, None] = {}
        delivered = 0
        try:
            while delivered < len(examples):
                while len(running) < self.max_episodes and (job := next(waiting, None)) is not None:
                    # A group stays on one shard, where it can share its prompt's pages.
                    running[self._begin(*job, examples, play, job[0] % shards)] = None
                for item in self._cycle(play):
                    del running[item]
                    finished[item.index].append(item)
                while delivered < len(examples) and len(finished[delivered]) == play.group_size:
                    self.usage.seconds = time.perf_counter() - begin
                    self.usage.decoders = {name: d.usage - before[name] for name, d in self.decoders.items()}
                    self.usage.retriever = since(counted(self.searcher), counted_before)
                    runs = sorted(finished[delivered], key=lambda r: r.episode.trajectory.sample)
                    yield Group(examples[delivered], [r.episode.trajectory for r in runs])
                    finished[delivered] = []
                    delivered += 1
        finally:
            self._abandon(running)

    # -- one cycle ----------------------------------------------------------------------------------------------

    def _cycle(self, play: Play) -> list[_Running]:
        """Serve requests until nothing is new, play one round; the episodes that finished."""
        self._deliver(block=False)
        ended = self._serve(play)
        launched = [decoder for decoder in self.decoders.values() if decoder.launch()]
        if not launched:
            if self._outstanding and not ended:
                begin = time.perf_counter()
                self._deliver(block=True)
                self.usage.starved_s += time.perf_counter() - begin
            return ended
        for decoder in launched:
            for stream, call in decoder.collect():
                self._generated(decoder, stream, call)
        return ended

    def _begin(self, index: int, sample: int, examples: Sequence[Example], play: Play, shard: int) -> _Running:
        begin = time.perf_counter()
        episode = Episode(play.workflow, examples[index], play.mode, sample=sample, version=play.version)
        self.usage.workflow_s += time.perf_counter() - begin
        self.usage.episodes += 1
        item = _Running(index, episode, shard)
        self._ready.append(item)
        return item

    def _serve(self, play: Play) -> list[_Running]:
        """Hand out all new requests; a request answered at once may bring the next."""
        searches: dict[int, list[_Ticket]] = defaultdict(list)
        ended = []
        ready, self._ready = self._ready, []
        for item in dict.fromkeys(ready):
            while requests := item.episode.take():
                for number, request in requests:
                    ticket = _Ticket(item, number, request, time.perf_counter())
                    if isinstance(request, Generate):
                        self._generate(ticket, play)
                    elif isinstance(request, Force):
                        self._append(ticket, play)
                        item.episode.reply(number, None)
                    elif isinstance(request, Search):
                        if self.searcher is None:
                            raise ValueError("the workflow searches, but there is no retriever: set config.retriever")
                        searches[request.k].append(ticket)
                    else:
                        assert isinstance(request, Tool)
                        self._outstanding += 1
                        self._threads.submit(self._call_tool, ticket, play.tools)
            if item.episode.done:
                self._close(item)
                ended.append(item)
        for k, tickets in searches.items():
            for batch in batches(tickets, self.search_batch):
                self._outstanding += 1
                self.usage.search_batches += 1
                self._threads.submit(self._search, batch, k)
        return ended

    # -- requests -----------------------------------------------------------------------------------------------

    def _append(self, ticket: _Ticket, play: Play) -> tuple[CachedStream, Stream]:
        """Record what a request appends, in the episode and in the cache of its role's model."""
        request, item = ticket.request, ticket.running
        if request.role not in play.roles:
            raise ValueError(f"the workflow speaks for role {request.role!r}; the recipe has: {', '.join(play.roles)}")
        record = item.episode.observe(request)
        role = play.roles[request.role]
        if request.stream not in item.streams:
            uid = stream_uid(item.episode.trajectory.example.id, item.episode.trajectory.sample, request.stream)
            item.streams[request.stream] = (role, self.decoders[role.model].open(uid, item.shard, role.adapter))
        owner, stream = item.streams[request.stream]
        if (owner.model, owner.adapter) != (role.model, role.adapter):
            raise ValueError(
                f"stream {request.stream!r} is of {owner.model}/{owner.adapter or 'base'}, role {request.role!r} "
                f"speaks with {role.model}/{role.adapter or 'base'}: give it a stream of its own"
            )
        stream.append(request.append)
        if isinstance(request, Force):
            stream.append(request.forced)
        return stream, record

    def _generate(self, ticket: _Ticket, play: Play) -> None:
        request = ticket.request
        stream, _ = self._append(ticket, play)
        role = play.roles[request.role]
        sampling = request.sampling or (role.train if play.mode == "train" else role.evaluate)
        decoder = self.decoders[role.model]
        if not decoder.submit(stream, ticket, request.stop, request.limit, sampling, request.allowed):
            empty = Span(request.role, SAMPLED, np.zeros(0, np.int32), version=play.version)
            ticket.running.episode.reply(ticket.number, Reply(empty.tokens, "", "limit", empty))

    def _generated(self, decoder: Decoder, stream: CachedStream, call: Call) -> None:
        """A call has ended: its tokens go into the record as they were sampled."""
        ticket: _Ticket = call.ticket
        request, episode = ticket.request, ticket.running.episode
        tokens, logp, entropy, certainty, margin, kept = call.emitted()
        filtered = kept.shape[1] > 0 and bool((kept >= 0).any())
        span = Span(
            request.role, SAMPLED, tokens, logp, entropy, certainty, margin, kept if filtered else None,
            temperature=call.sampling.temperature, version=episode.trajectory.policy_version,
        )  # fmt: skip
        episode.streams[request.stream].add(span)
        stopped_by = "limit"
        if call.reason == STOPPED:
            stopped_by = decoder.stops.found(call.stop_state) or ""
        elif call.reason == ENDED:
            stopped_by = "end"
        begin = time.perf_counter()
        episode.reply(ticket.number, Reply(tokens, self.decode(tokens.tolist()), stopped_by, span))
        self._ready.append(ticket.running)
        self.usage.workflow_s += time.perf_counter() - begin

    def _search(self, tickets: list[_Ticket], k: int) -> None:
        self._done.put((tickets, self._find(tickets, k)))

    def _find(self, tickets: list[_Ticket], k: int) -> list[Found]:
        """On a host thread: one retriever call for the queries of many episodes."""
        queries, scopes = [], []
        for ticket in tickets:
            example = ticket.running.episode.trajectory.example
            scope = ticket.request.scope if ticket.request.scope is not None else example.scope
            queries += ticket.request.queries
            scopes += [scope] * len(ticket.request.queries)
        try:
            assert self.searcher is not None
            results = iter(self.searcher.search(queries, k, scopes))
            return [Found([next(results) for _ in ticket.request.queries]) for ticket in tickets]
        except Exception as error:
            if isinstance(error, ValueError) and len(tickets) > 1:  # one query is wrong: the others are not
                return [found for ticket in tickets for found in self._find([ticket], k)]
            # Whatever a retriever raises becomes an observation the policy sees and a mark the update sees.
            reason = f"{type(error).__name__}: {error}"
            return [Found([[] for _ in ticket.request.queries], reason) for ticket in tickets]

    def _call_tool(self, ticket: _Ticket, tools: Mapping[str, Callable]) -> None:
        self._done.put(([ticket], [call_tool(ticket.request, tools)]))

    def _deliver(self, block: bool) -> None:
        """Give finished searches and tools to their episodes; with block, wait for at least one."""
        while self._outstanding:
            try:
                tickets, replies = self._done.get(block=block)
            except queue.Empty:
                return
            self._outstanding -= 1
            block = False
            begin = time.perf_counter()
            for ticket, reply in zip(tickets, replies):
                if isinstance(reply, Found):
                    wait_s = begin - ticket.asked
                    self.usage.searches += len(ticket.request.queries)
                    self.usage.search_s += wait_s * len(ticket.request.queries)
                    ticket.running.episode.searched(ticket.request, reply, wait_s)
                ticket.running.episode.reply(ticket.number, reply)
                self._ready.append(ticket.running)
            self.usage.workflow_s += time.perf_counter() - begin

    # -- endings ------------------------------------------------------------------------------------------------

    def _close(self, item: _Running) -> None:
        for role, stream in item.streams.values():
            self.decoders[role.model].close(stream)
        item.streams = {}

    def _abandon(self, running: Mapping[_Running, None]) -> None:
        """The caller stopped early, or something raised: leave every decoder empty for the next rollout."""
        for decoder in self.decoders.values():
            decoder.abandon()
        for item in running:
            self._close(item)
        self._ready = []
        while self._outstanding:
            self._done.get()
            self._outstanding -= 1
        for decoder in self.decoders.values():
            decoder.finish()


def since(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was counted since: totals are subtracted; what is a state or a time (`_s`) stays."""
    return {
        name: value if name.endswith("_s") or name == "servers_down" else value - before.get(name, 0.0)
        for name, value in now.items()
    }


def batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
