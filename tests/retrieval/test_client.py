import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.client import CachedRetriever, Retriever
from rlrag.trajectory import Passage, SearchUnavailable
from tests.shared_data import FIXTURES


class Recorder:
    """An index that answers with its own request, and keeps the requests; `act` may sleep or raise first."""

    def __init__(self, act=lambda: None):
        self.requests = []
        self.act = act

    def search(self, queries, k, scopes=None):
        self.requests.append((tuple(queries), k, None if scopes is None else tuple(scopes)))
        self.act()
        scopes = scopes or [None] * len(queries)
        return [[Passage(f"{query}|{k}|{scope}", "", "", 1.0)] for query, scope in zip(queries, scopes)]


def ids(results):
    return [[passage.id for passage in passages] for passages in results]


def test_answers_are_the_index_s_own():
    index = Bm25Index.from_jsonl(FIXTURES / "corpus_titled.jsonl")
    retriever: Retriever = CachedRetriever(index, deadline_s=30.0)
    queries = ["ada holt", "zebra", "bells", "ada holt"]
    assert retriever.search(queries, 2) == index.search(queries, 2)
    assert retriever.search([], 2) == []


def test_only_what_is_not_cached_reaches_the_index():
    index = Recorder()
    retriever = CachedRetriever(index)
    assert ids(retriever.search(["a", "b", "a"], 3)) == [["a|3|None"], ["b|3|None"], ["a|3|None"]]
    assert ids(retriever.search(["b", "c"], 3)) == [["b|3|None"], ["c|3|None"]]
    assert ids(retriever.search(["a"], 4)) == [["a|4|None"]]  # another k is another question
    assert ids(retriever.search(["a", "a"], 3, ["w1", None])) == [["a|3|w1"], ["a|3|None"]]  # so is another scope
    assert index.requests == [
        (("a", "b"), 3, None),
        (("c",), 3, None),
        (("a",), 4, None),
        (("a",), 3, ("w1",)),
    ]
    metrics = retriever.metrics()
    assert (metrics["requests"], metrics["queries"]) == (4, 8)
    assert (metrics["cache_hits"], metrics["failures"]) == (2, 0)


def test_what_a_caller_does_to_its_answer_stays_with_it():
    retriever = CachedRetriever(Recorder())
    retriever.search(["a"], 1)[0].clear()
    assert ids(retriever.search(["a"], 1)) == [["a|1|None"]]


def test_the_least_recently_used_query_leaves_the_cache():
    index = Recorder()
    retriever = CachedRetriever(index, cache_size=2)
    for query in ("a", "b", "a", "c", "a", "b"):  # c pushes b out, not a
        retriever.search([query], 1)
    assert [request[0][0] for request in index.requests] == ["a", "b", "c", "b"]
    uncached = CachedRetriever(index := Recorder(), cache_size=0)
    for _ in range(3):
        uncached.search(["a"], 1)
    assert len(index.requests) == 3


def test_a_late_answer_is_dropped():
    release = threading.Event()
    index = Recorder(act=lambda: release.wait(20))
    retriever = CachedRetriever(index, deadline_s=0.05)
    start = time.perf_counter()
    with pytest.raises(SearchUnavailable, match=r"no answer within the deadline of 0\.05 s"):
        retriever.search(["a"], 1)
    assert 0.05 <= time.perf_counter() - start < 5
    release.set()
    for thread in threading.enumerate():
        if thread.name == "search":
            thread.join(20)
    retriever.search(["a"], 1)
    assert len(index.requests) == 2  # the late answer did not enter the cache
    assert retriever.metrics()["failures"] == 1


def test_injected_latency_counts_against_the_deadline():
    index = Recorder()
    retriever = CachedRetriever(index, latency_s=30.0, deadline_s=0.05)
    start = time.perf_counter()
    with pytest.raises(SearchUnavailable, match="deadline"):
        retriever.search(["a"], 1)
    assert 0.05 <= time.perf_counter() - start < 5
    assert index.requests == []


def test_waiting_searches_overlap_and_hits_do_not_wait():
    retriever = CachedRetriever(Recorder(), latency_s=0.3)
    start = time.perf_counter()
    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda n: retriever.search([f"q{n}"], 1), range(200)))
    assert time.perf_counter() - start < 6  # one after the other: 60 s
    assert ids(results[7]) == [["q7|1|None"]]
    assert 0.3 <= retriever.metrics()["latency_p50_s"] <= retriever.metrics()["latency_p99_s"] < 6
    start = time.perf_counter()
    for n in range(200):
        retriever.search([f"q{n}"], 1)
    assert time.perf_counter() - start < 0.3
    assert retriever.metrics()["cache_hits"] == 200


def test_injected_trouble_depends_on_the_request_and_not_on_threads():
    def failures(seed, workers):
        retriever = CachedRetriever(Recorder(), error_rate=0.3, jitter_s=0.01, seed=seed)

        def fails(n):
            try:
                retriever.search([f"q{n}"], 1)
            except SearchUnavailable:
                return n
            return None

        with ThreadPoolExecutor(workers) as pool:
            failed = {n for n in pool.map(fails, range(200)) if n is not None}
        assert retriever.metrics()["failures"] == len(failed)
        return failed

    first = failures(0, 1)
    assert 35 <= len(first) <= 85  # 60 +- 4 standard deviations
    assert failures(0, 32) == first
    assert failures(1, 32) != first
    with pytest.raises(SearchUnavailable) as error:
        CachedRetriever(Recorder(), error_rate=1.0).search(["a"], 1)
    assert error.value.reason == "injected failure (error_rate 1)"


def test_many_threads_agree():
    retriever = CachedRetriever(Recorder(), cache_size=5)

    def check(n):
        queries = [f"q{n % 7}", f"q{n % 11}"]
        return ids(retriever.search(queries, 2)) == [[f"{query}|2|None"] for query in queries]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(check, range(2000)))
    assert retriever.metrics()["requests"] == 2000
    assert retriever.metrics()["queries"] == 4000


@pytest.mark.parametrize("deadline_s", [None, 30.0])
def test_a_broken_index_is_unavailable_and_a_bad_request_is_the_caller_s(deadline_s):
    def broken():
        raise KeyError("shard 3")

    with pytest.raises(SearchUnavailable, match="the index failed: KeyError: 'shard 3'"):
        CachedRetriever(Recorder(broken), deadline_s=deadline_s).search(["a"], 1)
    index = Bm25Index.from_jsonl(FIXTURES / "corpus_titled.jsonl")
    retriever = CachedRetriever(index, deadline_s=deadline_s)
    with pytest.raises(ValueError, match="no scope 'w1'"):
        retriever.search(["a"], 1, ["w1"])
    with pytest.raises(ValueError, match="k is 0"):
        retriever.search(["a"], 0)
    with pytest.raises(ValueError, match="1 scopes for 2 queries"):
        retriever.search(["a", "b"], 1, [None])
    with pytest.raises(ValueError, match="the string 'abc'"):
        retriever.search("abc", 1)


def test_an_index_that_answers_too_little_is_unavailable():
    class Short:
        def search(self, queries, k, scopes=None):
            return [[]]

    with pytest.raises(SearchUnavailable, match="answered 1 of 2 queries"):
        CachedRetriever(Short()).search(["a", "b"], 1)


def test_closed():
    retriever = CachedRetriever(Recorder())
    retriever.search(["a"], 1)
    retriever.close()
    with pytest.raises(SearchUnavailable, match="closed"):
        retriever.search(["a"], 1)


@pytest.mark.parametrize(
    "options",
    [{"cache_size": -1}, {"latency_s": -0.1}, {"jitter_s": -1}, {"deadline_s": 0.0}, {"error_rate": 1.5}],
)
def test_bad_options_name_the_value(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values()))).replace(".", r"\.")):
        CachedRetriever(Recorder(), **options)


def test_metrics_before_the_first_request():
    assert set(CachedRetriever(Recorder()).metrics().values()) == {0.0}
