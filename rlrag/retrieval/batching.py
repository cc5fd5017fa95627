"""Many small requests as few large searches: dynamic batching, a bounded queue, and a cache in which every question is
asked once however many ask it at the same time (single flight). For one event loop; searches run in threads."""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rlrag.retrieval.index import Index
from rlrag.retrieval.wire import Refused
from rlrag.trajectory import Passage, SearchUnavailable

Key = tuple[str, int, str | None]  # query, k, scope
Found = tuple[Passage, ...]


@dataclass
class Totals:
    """Since the start, but for `waiting`: queries in the queue now."""

    queries: int = 0
    cache_hits: int = 0  # answered from what was kept
    joined: int = 0  # that waited for another's search of the same
    searched: int = 0
    batches: int = 0
    expired: int = 0  # that nobody waited for any longer when their turn came
    waiting: int = 0


@dataclass(eq=False)
class _Flight:
    """One query on its way."""

    key: Key
    done: asyncio.Future[Found]
    until: float  # loop time at which the last of those who wait gives up
    since: float


@dataclass
class Batcher:
    """max_batch: queries a search. max_waiting: queries in the queue; more are refused with 429. wait_s: how long a
    search is held back for others to join where it is not full (0: never; while one runs they gather anyway).
    threads: searches at once. cache_size: answers kept, the least recently used going first. observe: called after each
    search with its number of queries and its seconds."""

    index: Index
    max_batch: int = 256
    max_waiting: int = 8192
    wait_s: float = 0.0
    threads: int = 1
    cache_size: int = 65536
    observe: Callable[[int, float], None] = lambda queries, seconds: None
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self):
        for name, least in (("max_batch", 1), ("max_waiting", 1), ("threads", 1), ("wait_s", 0), ("cache_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        self._cache: OrderedDict[Key, Found] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}
        self._queues: dict[int, deque[_Flight]] = {}  # by k: a search has one
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="index")
        self._busy = 0
        self._held: asyncio.TimerHandle | None = None
        self._query_s = 1e-3  # a query's share of a search, a moving average

    async def search(
        self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None, deadline_s: float
    ) -> list[Found]:
        """Passages for each query. Raises Refused: 429 where the queue is full, 504 after deadline_s, 503 where the
        index failed, 400 where it can never answer."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        keys: list[Key] = [(query, k, scope) for query, scope in zip(queries, scopes or [None] * len(queries))]
        found: dict[Key, Found] = {}
        flights: dict[Key, _Flight] = {}
        new = []
        for key in keys:
            if key in self._cache:
                self._cache.move_to_end(key)
                found[key] = self._cache[key]
            elif key in self._flights:
                flights[key] = self._flights[key]
            elif key not in flights:
                flights[key] = _Flight(key, loop.create_future(), 0.0, now)
                new.append(flights[key])
        if new and self.totals.waiting + len(new) > self.max_waiting:
            raise Refused(429, f"{self.totals.waiting} queries are waiting, the most there may be", self._retry_after())
        self.totals.queries += len(keys)
        self.totals.cache_hits += sum(key in found for key in keys)
        self.totals.joined += len(keys) - len(new) - sum(key in found for key in keys)
        for flight in flights.values():
            flight.until = max(flight.until, now + deadline_s)
        if new:
            self._flights |= {flight.key: flight for flight in new}
            self._queues.setdefault(k, deque()).extend(new)
            self.totals.waiting += len(new)
            self._start()
        if flights:
            await asyncio.wait([flight.done for flight in flights.values()], timeout=deadline_s)
        for key, flight in flights.items():
            if not flight.done.done():
                raise Refused(504, f"no answer within {deadline_s:g} s")
            found[key] = flight.done.result()
        return [found[key] for key in keys]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- searches -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """As many searches as there are threads and queries for, or one a little later."""
        loop = asyncio.get_running_loop()
        while self._busy < self.threads and self._queues:
            k = min(self._queues, key=lambda k: self._queues[k][0].since)  # whose first has waited longest
            queue = self._queues[k]
            late = queue[0].since + self.wait_s - loop.time()
            if len(queue) < self.max_batch and late > 0:
                if self._held is None:
                    self._held = loop.call_later(late, self._release)
                return
            batch = [queue.popleft() for _ in range(min(len(queue), self.max_batch))]
            if not queue:
                del self._queues[k]
            self.totals.waiting -= len(batch)
            now = loop.time()
            wanted = [flight for flight in batch if flight.until > now]
            for flight in batch:
                if flight.until <= now:
                    self.totals.expired += 1
                    self._land(flight, Refused(504, "the deadline passed in the queue"))
            if wanted:
                self._busy += 1
                loop.create_task(self._fly(wanted, k))  # noqa: RUF006  held by the futures it answers

    def _release(self) -> None:
        self._held = None
        self._start()

    async def _fly(self, batch: list[_Flight], k: int) -> None:
        begin = time.perf_counter()
        keys = [flight.key for flight in batch]
        answers = await asyncio.get_running_loop().run_in_executor(self._pool, search, self.index, keys, k)
        seconds = time.perf_counter() - begin
        self._busy -= 1
        self._query_s += 0.1 * (seconds / len(batch) - self._query_s)
        self.totals.batches += 1
        self.totals.searched += len(batch)
        self.observe(len(batch), seconds)
        for flight, answer in zip(batch, answers, strict=True):
            self._land(flight, answer)
        self._start()

    def _land(self, flight: _Flight, answer: Found | Refused) -> None:
        del self._flights[flight.key]
        if isinstance(answer, Refused):
            flight.done.set_exception(answer)
            flight.done.exception()  # seen: those who waited for it may be gone
            return
        flight.done.set_result(answer)
        if self.cache_size:
            self._cache[flight.key] = answer
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)

    def _retry_after(self) -> float:
        """Seconds until about half of the queue is through."""
        return max(1.0, math.ceil(self.totals.waiting * self._query_s / self.threads / 2))


def search(index: Index, keys: Sequence[Key], k: int) -> list[Found | Refused]:
    """In a thread: one search. Where the index refuses a batch, each of its queries is asked alone, so that one that
    cannot be answered costs the others nothing."""
    scopes = [scope for _, _, scope in keys]
    try:
        given = scopes if any(scope is not None for scope in scopes) else None
        answers = index.search([query for query, _, _ in keys], k, given)
        if len(answers) != len(keys):
            raise SearchUnavailable(f"the index answered {len(answers)} of {len(keys)} queries")
        return [tuple(answer) for answer in answers]
    except ValueError as error:
        if len(keys) == 1:
            return [Refused(400, str(error))]
        return [answer for key in keys for answer in search(index, [key], k)]
    except Exception as error:
        told = error.reason if isinstance(error, SearchUnavailable) else f"{type(error).__name__}: {error}"
        return [Refused(503, f"the search failed: {told}", 1.0)] * len(keys)
