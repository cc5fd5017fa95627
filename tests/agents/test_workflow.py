import numpy as np
import pytest

from rlrag.agents.workflow import (
    Allowed,
    Episode,
    Force,
    Found,
    Generate,
    Reply,
    Sampling,
    Search,
    Together,
    Tool,
    call_tool,
    drive,
)
from rlrag.trajectory import (
    COMPLETED,
    FAILED,
    FORCED,
    OBSERVED,
    SAMPLED,
    SEARCH_FAILED,
    TRUNCATED,
    Example,
    Outcome,
    Passage,
    Span,
)

EXAMPLE = Example("q", "?", ("a",), scope="own scope")
ASK = Generate("a", "policy", [1, 2], ("</s>",), 8)


def write(episode: Episode, ticket: int, request: Generate, tokens: list[int]) -> None:
    span = Span(request.role, SAMPLED, np.asarray(tokens, np.int32))
    episode.observe(request).add(span)
    episode.reply(ticket, Reply(span.tokens, "", "end", span))


def script(episode, request):
    return [7, 8], "x</s>"


def no_search(queries, k, scope):
    raise AssertionError("no search was asked for")


def test_record_of_one_stream():
    def workflow(example, mode):
        reply = yield ASK
        reply.span.tags = np.asarray([1, 2], np.int32)
        found = yield Search(("q1", "q2"), k=3)
        yield Force("a", "policy", [3], [4, 5])
        return Outcome(found.passages[1][0].text, {"mode": mode})

    asked = []

    def search(queries, k, scope):
        asked.append((queries, k, scope))
        return [[Passage(query, "", f"about {query}")] for query in queries]

    done = drive(workflow, EXAMPLE, script, search, mode="evaluate")
    (stream,) = done.streams
    assert (stream.name, stream.role, stream.num_tokens) == ("a", "policy", 7)
    assert stream.tokens.tolist() == [1, 2, 7, 8, 3, 4, 5]
    assert stream.act.tolist() == [OBSERVED] * 2 + [FORCED] * 2 + [OBSERVED] + [FORCED] * 2
    assert stream.spans[1].tags.tolist() == [1, 2]
    assert asked == [(("q1", "q2"), 3, "own scope")]
    assert (done.status, done.num_searches) == (COMPLETED, 2)
    assert done.outcome == Outcome("about q2", {"mode": "evaluate"})


def test_drive_as_sampled():
    def workflow(example, mode):
        reply = yield ASK
        return Outcome(reply.stopped_by)

    done = drive(workflow, EXAMPLE, script, no_search, act=SAMPLED)
    assert done.num_sampled == 2
    assert done.outcome.answer == "</s>"


def test_together_waits_for_all_and_keeps_the_order():
    def workflow(example, mode):
        both = yield Together((ASK, Search(("q",), 1), Generate("b", "judge", [9], (), 4)))
        return Outcome(f"{both[0].tokens.tolist()} {both[1].passages} {both[2].tokens.tolist()}")

    episode = Episode(workflow, EXAMPLE, "train")
    requests = dict(episode.take())
    assert list(requests) == [0, 1, 2]
    assert episode.take() == []  # handed out once
    write(episode, 2, requests[2], [4])
    assert not episode.done
    episode.reply(1, Found([[]]))
    write(episode, 0, requests[0], [3])
    assert episode.done
    assert episode.trajectory.outcome.answer == "[3] [[]] [4]"
    assert [stream.name for stream in episode.trajectory.streams] == ["b", "a"]  # as they came into being


def test_tools():
    def workflow(example, mode):
        good = yield Tool("add", {"a": 1, "b": 2})
        bad = yield Tool("divide", {"a": 1, "b": 0})
        unknown = yield Tool("fly", {})
        return Outcome(None, {"seen": [good, bad, unknown]})

    tools = {"add": lambda a, b: a + b, "divide": lambda a, b: a / b}
    good, bad, unknown = drive(workflow, EXAMPLE, script, no_search, tools=tools).outcome.fields["seen"]
    assert (good.value, good.error) == (3, None)
    assert bad.error == "ZeroDivisionError: division by zero"
    assert unknown.error == "no tool named 'fly'; there are: add, divide"
    assert (call_tool(Tool("add", {"a": 1}), tools).error or "").startswith("TypeError")


def test_failed_workflow_is_marked_and_keeps_its_record():
    def workflow(example, mode):
        yield ASK
        raise KeyError("boom")

    done = drive(workflow, EXAMPLE, script, no_search)
    assert (done.status, done.error, done.outcome.answer) == (FAILED, "KeyError: 'boom'", None)
    assert done.streams[0].num_tokens == 4


def test_workflow_that_fails_before_its_first_request():
    def workflow(example, mode):
        raise ValueError("no room")
        yield ASK

    episode = Episode(workflow, EXAMPLE, "train")
    assert episode.done
    assert (episode.trajectory.status, episode.trajectory.streams) == (FAILED, [])


def test_failed_search_marks_the_episode_for_good():
    def workflow(example, mode):
        found = yield Search(("q",), 1)
        return Outcome("x", {"status": TRUNCATED, "error": found.error})

    episode = Episode(workflow, EXAMPLE, "train")
    ((ticket, request),) = episode.take()
    found = Found([[]], "deadline")
    episode.searched(request, found, 0.5)
    episode.reply(ticket, found)
    done = episode.trajectory
    assert (done.status, done.outcome.fields) == (SEARCH_FAILED, {"error": "deadline"})
    assert (done.searches[0].error, done.searches[0].wait_s) == ("deadline", 0.5)


def test_workflow_sets_its_status():
    def workflow(example, mode):
        yield ASK
        return Outcome(None, {"status": TRUNCATED, "limit": "max_turns"})

    done = drive(workflow, EXAMPLE, script, no_search)
    assert (done.status, done.outcome.fields) == (TRUNCATED, {"limit": "max_turns"})


def test_workflow_must_return_an_outcome():
    def workflow(example, mode):
        yield ASK
        return "answer"

    with pytest.raises(TypeError, match="must return an Outcome, this one returned 'answer'"):
        drive(workflow, EXAMPLE, script, no_search)


def test_sampling_is_checked():
    assert Sampling(0.0).temperature == 0
    assert Allowed((1, 2)).once is False
    with pytest.raises(ValueError, match="temperature is -1"):
        Sampling(-1)
    with pytest.raises(ValueError, match=r"top_k is 0 and top_p is 1\.5"):
        Sampling(top_p=1.5)
