"""Searches take as long as they are told to. Through a server: tests/launch/test_bench.py."""

import time

from rlrag.speed.searching import SlowSearcher, searchers


def test_a_search_takes_its_time_and_answers_with_the_query():
    with searchers([0.0, 0.05], server=False) as searcher_of:
        begin = time.perf_counter()
        ((passage,), _) = searcher_of(0.05).search(["a", "b"], 1)
        assert 0.05 <= time.perf_counter() - begin < 1
        assert passage.id == "a"


def test_without_latency_it_does_not_sleep(monkeypatch):
    monkeypatch.setattr(time, "sleep", None)
    assert len(SlowSearcher(0.0).search(["a"], 1)) == 1
