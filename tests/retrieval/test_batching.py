import asyncio
import threading
import time

import pytest

from rlrag.retrieval.batching import Batcher
from rlrag.retrieval.wire import Refused
from rlrag.trajectory import SearchUnavailable
from tests.retrieval.serving import Echo


def run(batcher, scenario):
    async def body():
        try:
            return await scenario(batcher)
        finally:
            batcher.close()

    return asyncio.run(body())


async def ask(batcher, queries, k=1, scopes=None, deadline_s=5.0):
    return await batcher.search(queries, k, scopes, deadline_s)


def ids(answers):
    return [[passage.id for passage in answer] for answer in answers]


class Held(Echo):
    """Searches wait until they are let go."""

    def __init__(self):
        self.go = threading.Event()
        super().__init__(lambda: self.go.wait(5))


def test_queries_that_come_while_a_search_runs_are_one_search():
    index = Held()

    async def scenario(batcher):
        first = asyncio.create_task(ask(batcher, ["a"]))
        await asyncio.sleep(0.02)
        others = [asyncio.create_task(ask(batcher, [query])) for query in "bcde"]
        await asyncio.sleep(0.02)
        index.go.set()
        return [ids(await task) for task in (first, *others)]

    answers = run(Batcher(index, max_batch=3), scenario)
    assert answers == [[[f"{query}#0"]] for query in "abcde"]
    assert index.batches == [["a"], ["b", "c", "d"], ["e"]]


def test_a_question_is_searched_once():
    """While it is on its way, within one request, and afterwards from the cache; another k or scope is another."""
    index = Held()

    async def scenario(batcher):
        tasks = [asyncio.create_task(ask(batcher, ["a", "b", "a"])) for _ in range(10)]
        await asyncio.sleep(0.02)
        index.go.set()
        answers = [ids(await task) for task in tasks]
        assert answers == [[["a#0"], ["b#0"], ["a#0"]]] * 10
        await ask(batcher, ["a"])
        await ask(batcher, ["a"], k=2)
        await ask(batcher, ["a"], scopes=["s"])
        t = batcher.totals
        return t.queries, t.searched, t.joined, t.cache_hits, t.batches

    assert run(Batcher(index), scenario) == (33, 4, 28, 1, 3)
    assert index.batches == [["a", "b"], ["a"], ["a"]]


def test_the_cache_forgets_what_was_used_least_recently():
    async def scenario(batcher):
        for query in ("a", "b", "a", "c", "a", "b"):
            await ask(batcher, [query])
        return batcher.totals.cache_hits

    assert run(Batcher(Echo(), cache_size=2), scenario) == 2  # a, a; b was pushed out by c
    assert run(Batcher(Echo(), cache_size=0), scenario) == 0


def test_a_full_queue_refuses_and_loses_nothing():
    index = Held()

    async def scenario(batcher):
        tasks = [asyncio.create_task(ask(batcher, ["a"]))]
        await asyncio.sleep(0.02)
        tasks.append(asyncio.create_task(ask(batcher, ["b", "c"])))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as told:
            await ask(batcher, ["d"])
        assert await asyncio.wait_for(asyncio.gather(ask_later(batcher)), 5)
        assert (told.value.status, told.value.retry_after_s) == (429, 1.0)
        return [ids(await task) for task in tasks]

    async def ask_later(batcher):
        task = asyncio.create_task(ask(batcher, ["b"]))  # one that is waiting already costs no room
        await asyncio.sleep(0.02)
        index.go.set()
        return ids(await task) == [["b#0"]]

    assert run(Batcher(index, max_waiting=2), scenario) == [[["a#0"]], [["b#0"], ["c#0"]]]


def test_deadlines():
    """Who waited too long is told; what nobody waits for is not searched; who joined with more time is served."""
    index = Held()

    async def scenario(batcher):
        blocking = asyncio.create_task(ask(batcher, ["a"]))
        await asyncio.sleep(0.02)
        hasty, patient = (asyncio.create_task(ask(batcher, ["b"], deadline_s=s)) for s in (0.05, 5.0))
        lost = asyncio.create_task(ask(batcher, ["c"], deadline_s=0.05))
        for task in (hasty, lost):
            with pytest.raises(Refused) as told:
                await task
            assert told.value.status == 504
        index.go.set()
        return ids(await blocking), ids(await patient), batcher.totals.expired

    assert run(Batcher(index), scenario) == ([["a#0"]], [["b#0"]], 1)
    assert index.batches == [["a"], ["b"]]


def test_one_query_that_cannot_be_answered_costs_the_others_nothing():
    index = Held()

    async def scenario(batcher):
        blocking = asyncio.create_task(ask(batcher, ["a"]))
        await asyncio.sleep(0.02)
        good, bad = (asyncio.create_task(ask(batcher, [query])) for query in ("b", "refuse"))
        await asyncio.sleep(0.02)
        index.go.set()
        await blocking
        with pytest.raises(Refused) as told:
            await bad
        return told.value.status, told.value.reason, ids(await good)

    assert run(Batcher(index), scenario) == (400, "this index refuses `refuse`", [["b#0"]])
    assert index.batches == [["a"], ["b", "refuse"], ["b"], ["refuse"]]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SearchUnavailable("the cluster sleeps"), "the search failed: the cluster sleeps"),
        (RuntimeError("broken"), "the search failed: RuntimeError: broken"),
    ],
)
def test_an_index_that_fails_is_told_and_asked_again(error, reason):
    failing = [error]

    def act():
        if failing:
            raise failing.pop()

    async def scenario(batcher):
        with pytest.raises(Refused) as told:
            await ask(batcher, ["a"])
        return told.value.status, told.value.reason, ids(await ask(batcher, ["a"]))  # a failure is not cached

    assert run(Batcher(Echo(act)), scenario) == (503, reason, [["a#0"]])


def test_a_short_answer_is_a_failure():
    class Short:
        def search(self, queries, k, scopes=None):
            return []

    async def scenario(batcher):
        with pytest.raises(Refused) as told:
            await ask(batcher, ["a"])
        return told.value.reason

    assert run(Batcher(Short()), scenario) == "the search failed: the index answered 0 of 1 queries"


def test_a_search_is_held_back_for_others_to_join():
    async def scenario(batcher):
        begin = time.perf_counter()
        tasks = [asyncio.create_task(ask(batcher, [query])) for query in "ab"]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(ask(batcher, ["c"])))
        for task in tasks:
            await task
        return time.perf_counter() - begin

    index = Echo()
    assert 0.05 <= run(Batcher(index, wait_s=0.05), scenario) < 2
    assert index.batches == [["a", "b", "c"]]
    full = Echo()
    assert run(Batcher(full, wait_s=5.0, max_batch=2), lambda b: asyncio.wait_for(first_two(b), 2)) is None
    assert full.batches == [["a", "b"]]


async def first_two(batcher):
    await asyncio.gather(ask(batcher, ["a"]), ask(batcher, ["b"]))


def test_several_threads_search_at_once():
    index = Held()

    async def scenario(batcher):
        tasks = [asyncio.create_task(ask(batcher, [query])) for query in "ab"]
        await asyncio.sleep(0.1)
        started = len(index.batches)
        index.go.set()
        await asyncio.gather(*tasks)
        return started

    assert run(Batcher(index, threads=2, max_batch=1), scenario) == 2


@pytest.mark.parametrize(
    ("option", "value"), [("max_batch", 0), ("max_waiting", 0), ("threads", 0), ("wait_s", -1), ("cache_size", -1)]
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}: give at least"):
        Batcher(Echo(), **{option: value})
