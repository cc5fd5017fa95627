"""Searches that take a given time: in this process, or through a retrieval server that adds the latency itself."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlrag.trajectory import Passage

SearcherOf = Callable[[float], Any]  # latency in seconds -> what the engine asks


class SlowSearcher:
    """Answers every query with itself, after latency_s. Requests on other threads do not wait for each other."""

    def __init__(self, latency_s: float):
        self.latency_s = latency_s

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        if self.latency_s:
            time.sleep(self.latency_s)
        return [[Passage(query, "", "")] for query in queries]


@contextmanager
def searchers(latencies_s: Sequence[float], server: bool) -> Iterator[SearcherOf]:
    """From a latency to a searcher that has it. server: one retrieval server of words for each latency."""
    if not server:
        yield SlowSearcher
        return
    # Late: what serves and asks over the network is no core path.
    from rlrag.retrieval.client import CachedRetriever
    from rlrag.retrieval.remote import HttpIndex
    from rlrag.retrieval.spawn import SpawnedServer

    with TemporaryDirectory() as folder, ExitStack() as running:
        corpus = Path(folder) / "passages.jsonl"
        corpus.write_text("".join(f'{{"id": "{n}", "title": "t{n}", "text": "{n} text"}}\n' for n in range(1000)))
        indexes = {}
        for latency in latencies_s:
            arguments = [f"--index=bm25:{corpus}", "--cache_size=0", f"--latency_s={latency}"]
            started = SpawnedServer(arguments, Path(folder) / f"{latency}.log")
            running.callback(started.stop)
            indexes[latency] = HttpIndex([started.url], connections=256)
            indexes[latency].wait_ready(60)
        yield lambda latency: CachedRetriever(indexes[latency], cache_size=0)
