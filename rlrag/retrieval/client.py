"""What a searcher sees of retrieval: one protocol, and its implementation over any index, near or far.

Rollouts call `search` from many host threads at once. A search either answers within its deadline or raises
`SearchUnavailable`; it never hangs an episode and never answers a failure with an empty list, which would look like
"nothing found". Retries are deliberately absent here: within a process a search that failed would fail again, and an
index over the network (rlrag/retrieval/remote.py) has its own.
"""

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlrag.retrieval.index import Index
from rlrag.trajectory import Passage, SearchUnavailable

_Key = tuple[str, int, str | None]  # query, k, scope


class Retriever(Protocol):
    """The interface of retrieval, whatever index is behind it. Safe to call from many threads at once."""

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """At most k passages for each query, best first. scopes: a sub-corpus for each query (None: the whole).

        Raises SearchUnavailable when the deadline passed or the search failed, ValueError for a request that can
        never be answered (an unknown scope, k below 1).
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Totals since the start: requests, queries, cache_hits, failures (requests), and what the index itself
        counts; and the latency of the last requests as their callers saw it: latency_p50_s, latency_p99_s (0 before
        the first)."""
        ...

    def close(self) -> None:
        """Give up what the retriever holds; a search after it raises SearchUnavailable."""
        ...


class CachedRetriever:
    """A retriever over an index, with a cache, a deadline, and injected trouble for tests.

    cache_size: queries whose answers are kept, the least recently used going first (0: none).
    deadline_s: seconds a request may take, injected latency included (None: any, or the index has its own). A search
      that outlasts it goes on in its thread, which cannot be stopped, and its late answer is dropped.
    latency_s, jitter_s: every request that is not answered wholly from the cache first waits latency_s plus a share
      of jitter_s; waiting requests do not hold each other up.
    error_rate: the share of requests, before the cache is filled, that raise SearchUnavailable.
    seed: which requests are hit, and how far; it depends on the request alone and not on the order of threads, so a
      request that was made to fail fails again.
    """

    def __init__(
        self,
        index: Index,
        *,
        cache_size: int = 65536,
        deadline_s: float | None = None,
        latency_s: float = 0.0,
        jitter_s: float = 0.0,
        error_rate: float = 0.0,
        seed: int = 0,
    ):
        if cache_size < 0 or latency_s < 0 or jitter_s < 0:
            raise ValueError(
                f"cache_size is {cache_size}, latency_s {latency_s}, jitter_s {jitter_s}: give numbers of at least 0"
            )
        if deadline_s is not None and deadline_s <= 0:
            raise ValueError(f"deadline_s is {deadline_s}: give a positive number of seconds, or None for no deadline")
        if not 0 <= error_rate <= 1:
            raise ValueError(f"error_rate is {error_rate}: give a share between 0 and 1")
        self._index = index
        self._cache_size, self._deadline_s = cache_size, deadline_s
        self._latency_s, self._jitter_s, self._error_rate, self._seed = latency_s, jitter_s, error_rate, seed
        self._lock = threading.Lock()  # guards what follows; never held while searching or waiting
        self._cache: OrderedDict[_Key, tuple[Passage, ...]] = OrderedDict()
        self._totals = {"requests": 0.0, "queries": 0.0, "cache_hits": 0.0, "failures": 0.0}
        self._latencies_s: deque[float] = deque(maxlen=4096)
        self._closed = False

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """See `Retriever.search`. Only queries that are not in the cache reach the index, each once."""
        if isinstance(queries, str):
            raise ValueError(f"queries is the string {queries!r}: give a sequence of strings")
        if scopes is not None and len(scopes) != len(queries):
            raise ValueError(
                f"{len(scopes)} scopes for {len(queries)} queries: give one scope (or None) for each query"
            )
        start = time.perf_counter()
        keys: list[_Key] = [(query, k, scope) for query, scope in zip(queries, scopes or [None] * len(queries))]
        failed = False
        try:
            found = self._cached(keys)
            missing = list(dict.fromkeys(key for key in keys if key not in found))
            if missing:
                found |= self._fetch(missing, start)
            return [list(found[key]) for key in keys]
        except SearchUnavailable:
            failed = True
            raise
        finally:
            with self._lock:
                self._totals["requests"] += 1
                self._totals["queries"] += len(keys)
                self._totals["failures"] += failed
                self._latencies_s.append(time.perf_counter() - start)

    def metrics(self) -> dict[str, float]:
        with self._lock:
            totals, latencies_s = dict(self._totals), list(self._latencies_s)
        p50, p99 = np.percentile(latencies_s, [50, 99]).tolist() if latencies_s else (0.0, 0.0)
        own = getattr(self._index, "metrics", dict)()
        return own | totals | {"latency_p50_s": p50, "latency_p99_s": p99}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._cache.clear()

    def _cached(self, keys: Sequence[_Key]) -> dict[_Key, tuple[Passage, ...]]:
        found = {}
        with self._lock:
            if self._closed:
                raise SearchUnavailable("the retriever was closed")
            for key in keys:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    self._totals["cache_hits"] += 1
                    found[key] = self._cache[key]
        return found

    def _fetch(self, keys: list[_Key], start: float) -> dict[_Key, tuple[Passage, ...]]:
        """Ask the index, within the deadline counted from `start`, and fill the cache."""
        unlucky, share = self._draw(keys)
        wait_s = self._latency_s + self._jitter_s * share
        if self._deadline_s is not None and wait_s >= self._deadline_s:
            time.sleep(max(0.0, start + self._deadline_s - time.perf_counter()))
            raise self._late()
        if wait_s:
            time.sleep(wait_s)
        if unlucky < self._error_rate:
            raise SearchUnavailable(f"injected failure (error_rate {self._error_rate:g})")
        answers = self._ask(keys, start)
        found = {key: tuple(answer) for key, answer in zip(keys, answers, strict=True)}
        with self._lock:
            if self._cache_size and not self._closed:
                self._cache |= found
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return found

    def _ask(self, keys: list[_Key], start: float) -> list[list[Passage]]:
        """Search in this thread, or, where there is a deadline, in one of its own that can be left behind."""
        if self._deadline_s is None:
            return self._search_index(keys)
        outcome: list[list[list[Passage]] | Exception] = []
        done = threading.Event()

        def work():
            try:
                outcome.append(self._search_index(keys))
            except Exception as error:
                outcome.append(error)
            done.set()

        threading.Thread(target=work, name="search", daemon=True).start()
        if not done.wait(max(0.0, start + self._deadline_s - time.perf_counter())):
            raise self._late()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _search_index(self, keys: list[_Key]) -> list[list[Passage]]:
        scopes = [scope for _, _, scope in keys]
        try:
            answers = self._index.search(
                [query for query, _, _ in keys], keys[0][1], scopes if any(s is not None for s in scopes) else None
            )
        except (ValueError, SearchUnavailable):
            raise
        except Exception as error:
            raise SearchUnavailable(f"the index failed: {type(error).__name__}: {error}") from error
        if len(answers) != len(keys):
            raise SearchUnavailable(f"the index answered {len(answers)} of {len(keys)} queries")
        return answers

    def _late(self) -> SearchUnavailable:
        return SearchUnavailable(f"no answer within the deadline of {self._deadline_s:g} s")

    def _draw(self, keys: list[_Key]) -> tuple[float, float]:
        """Two numbers in [0, 1) that depend on the seed and the request only."""
        digest = hashlib.blake2b(repr((self._seed, keys)).encode(), digest_size=16).digest()
        return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64
