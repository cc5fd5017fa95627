"""Conformance: each line of the table of wire dialects, as server and as client, with messages written out by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrag.retrieval.wire import DIALECTS, Limits, Refused, build_reply, build_requests, parse_reply, parse_request
from rlrag.trajectory import Passage

MARN = Passage("17", "Marn", "A river town.", 2.5)
HOLT = Passage("18", "Ada Holt", "An engineer.", 1.25)
FOUND = [[MARN, HOLT], [HOLT]]
D17, D18 = {"id": "17", "contents": '"Marn"\nA river town.'}, {"id": "18", "contents": '"Ada Holt"\nAn engineer.'}


def reply_to(request, found=FOUND):
    wanted = parse_request(json.dumps(request).encode(), Limits(), 3)
    return json.loads(build_reply(wanted, [list(passages)[: wanted.k] for passages in found]))


# What a server is asked, and what it must answer where it found FOUND (for one query its first part).
SERVER = {
    "search_r1 with scores": (
        {"queries": ["a", "b"], "topk": 2, "return_scores": True},
        [[{"document": D17, "score": 2.5}, {"document": D18, "score": 1.25}], [{"document": D18, "score": 1.25}]],
    ),
    "search_r1 without scores": ({"queries": ["a", "b"], "topk": 2, "return_scores": False}, [[D17, D18], [D18]]),
    "search_r1, scores not asked for": ({"queries": ["a", "b"], "topk": 1}, [[D17], [D18]]),
    "search_r1, topk null": (
        {"queries": ["a", "b"], "topk": None, "return_scores": True},
        [[{"document": D17, "score": 2.5}, {"document": D18, "score": 1.25}], [{"document": D18, "score": 1.25}]],
    ),
    "search_r1, topk 0": ({"queries": ["a", "b"], "topk": 0, "return_scores": False}, [[D17, D18], [D18]]),
    "skyrl with scores": (
        {"query": "a", "topk": 1, "return_scores": True},
        [[{"document": D17, "score": 2.5}]],
    ),
    "skyrl without scores": ({"query": "a", "topk": 2, "return_scores": False}, [[D17, D18]]),
    "slime": ({"queries": ["a"], "topk": 2, "return_scores": False}, [[D17, D18]]),
    "rerank with scores": (
        {"queries": ["a"], "topk_retrieval": 10, "topk_rerank": 1, "return_scores": True},
        [[{"document": '"Marn"\nA river town.', "score": 2.5}]],
    ),
    "rerank without scores": (
        {"queries": ["a", "b"], "topk_retrieval": 10, "topk_rerank": 2, "return_scores": False},
        [['"Marn"\nA river town.', '"Ada Holt"\nAn engineer.'], ['"Ada Holt"\nAn engineer.']],
    ),
    "web": ({"queries": ["a", "b"]}, [[{"document": D17}, {"document": D18}], [{"document": D18}]]),
}


@pytest.mark.parametrize("name", SERVER)
def test_as_server(name):
    request, result = SERVER[name]
    one = "query" in request or len(request["queries"]) == 1
    assert reply_to(request, FOUND[:1] if one else FOUND) == {"result": result}


def test_what_a_request_asks_for():
    def parsed(**fields):
        return parse_request(json.dumps({"queries": ["a"]} | fields).encode(), Limits(), 3, 10)

    assert (parsed().k, parsed(topk=7).k, parsed(topk=None).k, parsed(topk=0).k) == (3, 7, 3, 3)
    assert (parsed().retrieve, parsed(topk_rerank=2).retrieve, parsed(topk_rerank=20).retrieve) == (None, 10, 20)
    assert (parsed(topk_retrieval=50).retrieve, parsed(topk_retrieval=50).k) == (50, 3)
    assert parsed(scopes=["s"]).scopes == ["s"] and parsed(scopes=[None]).scopes is None
    assert parsed(something="else").queries == ["a"]  # fields of others are passed over


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{not json", "the body is no JSON"),
        (b"", "the body is no JSON"),
        (b'["a"]', "the body is a JSON list: give an object"),
        (b"{}", "give either queries, a list of strings, or query, one string"),
        (b'{"query": "a", "queries": ["a"]}', "give either queries"),
        (b'{"queries": []}', "queries is []: give a list of at least one string"),
        (b'{"queries": "a"}', "queries is 'a': give a list"),
        (b'{"queries": ["a", 3]}', "a query is 3: give a string"),
        (b'{"query": null}', "a query is None: give a string"),
        (json.dumps({"queries": ["a" * 100_000]}).encode(), "a query has 100000 characters: at most 8192"),
        (json.dumps({"queries": ["a"] * 2000}).encode(), "queries has 2000 entries: at most 1024"),
        (b'{"queries": ["a"], "topk": 1000000000}', "topk is 1000000000: give a whole number from 1 to 1000, or null"),
        (b'{"queries": ["a"], "topk": -1}', "topk is -1"),
        (b'{"queries": ["a"], "topk": 2.5}', "topk is 2.5"),
        (b'{"queries": ["a"], "topk": true}', "topk is True"),
        (b'{"queries": ["a"], "topk": false}', "topk is False"),
        (b'{"queries": ["a"], "topk": "3"}', "topk is '3'"),
        (b'{"queries": ["a"], "topk_rerank": 1001}', "topk_rerank is 1001"),
        (b'{"queries": ["a"], "return_scores": "yes"}', "return_scores is 'yes': give true or false"),
        (b'{"queries": ["a"], "scopes": ["x", "y"]}', "scopes is ['x', 'y']: give a string or null for each of the 1"),
        (b'{"queries": ["a"], "scopes": [3]}', "scopes is [3]"),
        (b'{"queries": ["\xff"]}', "the body is no JSON"),
    ],
)
def test_requests_that_are_refused(body, reason):
    with pytest.raises(Refused) as told:
        parse_request(body, Limits(), 3)
    assert told.value.status == 400 and told.value.reason.startswith(reason) and "\n" not in told.value.reason


# What a client must send for two queries (one body each line), and what it must understand.
CLIENT = {
    "search_r1": [{"queries": ["a", "b"], "topk": 2, "return_scores": True}],
    "skyrl": [{"query": q, "topk": 2, "return_scores": True} for q in "ab"],
    "slime": [{"queries": [q], "topk": 2, "return_scores": False} for q in "ab"],
    "rerank": [{"queries": ["a", "b"], "topk_retrieval": 10, "topk_rerank": 2, "return_scores": True}],
    "web": [{"queries": ["a", "b"]}],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_as_client(dialect):
    bodies = build_requests(dialect, ["a", "b"], 2, None, 64)
    assert [json.loads(body) for _, body in bodies] == CLIENT[dialect]
    assert sum(number for number, _ in bodies) == 2


def test_large_requests_are_cut_and_scopes_go_along():
    bodies = build_requests("search_r1", list("abcde"), 3, [None, None, "s", None, None], 2)
    assert [number for number, _ in bodies] == [2, 2, 1]
    assert [json.loads(body).get("scopes") for _, body in bodies] == [None, ["s", None], None]


BARE = [Passage(p.id, p.title, p.text) for p in (MARN, HOLT)]
REPLIES = {
    "with scores": ([[{"document": D17, "score": 2.5}, {"document": D18, "score": 1.25}]], [MARN, HOLT]),
    "scores are whole numbers": ([[{"document": D17, "score": 3}]], [Passage("17", "Marn", "A river town.", 3)]),
    "bare": ([[D17, D18]], BARE),
    "bare, one query, no outer list": ([D17, D18], BARE),
    "scored, one query, no outer list": ([{"document": D17, "score": 2.5}], [MARN]),
    "strings": (
        [['"Marn"\nA river town.']],
        [Passage("Marn\nA river town.", "Marn", "A river town.")],
    ),
    "rerank": (
        [[{"document": '"Marn"\nA river town.', "score": 2.5}]],
        [Passage("Marn\nA river town.", "Marn", "A river town.", 2.5)],
    ),
    "web": (
        [[{"document": {"contents": '"Marn"\nA river town.'}}]],
        [Passage("Marn\nA river town.", "Marn", "A river town.")],
    ),
    "bm25 adds title and text": ([[D17 | {"title": "Marn!", "text": "Else."}]], [Passage("17", "Marn!", "Else.")]),
    "an id that is a number": ([[{"id": 17, "contents": '"Marn"\nA river town.'}]], BARE[:1]),
    "nothing found": ([[]], []),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_client_understands(name):
    result, passages = REPLIES[name]
    assert parse_reply(json.dumps({"result": result}).encode(), 1, 3) == [passages]


def test_a_client_takes_no_more_than_it_asked_for():
    assert parse_reply(json.dumps({"result": [[D17, D18]]}).encode(), 1, 1) == [BARE[:1]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"oops", "the server's reply is no JSON"),
        (b"[]", "has no list `result`"),
        (b'{"detail": "no"}', "has no list `result`: {'detail': 'no'}"),
        (b'{"result": [[]]}', "the server answered 1 of 2 queries"),
        (b'{"result": []}', "the server answered 0 of 2 queries"),
        (b'{"result": [[], 3]}', "the results of a query in the server's reply are 3, no list"),
        (b'{"result": [[], [{"document": 3}]]}', "a document in the server's reply is 3"),
        (b'{"result": [[], [{"document": {"id": "1"}}]]}', "has no contents"),
        (b'{"result": [[], [{"document": "a", "score": "high"}]]}', "a score in the server's reply is 'high', no"),
    ],
)
def test_replies_that_are_none(body, message):
    """An empty list that was not an answer must not be taken for one."""
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as told:
        parse_reply(body, 2, 3)
    assert "\n" not in str(told.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.builds(Passage, TEXT, TEXT, TEXT, st.floats(-1e6, 1e6, width=32)), max_size=4), st.booleans())
def test_what_is_sent_is_what_arrives(passages, scores):
    """Every id, title, text and score, exactly, with and without scores."""
    request = {"queries": ["q"], "topk": 9, "return_scores": scores}
    wanted = parse_request(json.dumps(request).encode(), Limits(), 3)
    wished = passages if scores else [Passage(p.id, p.title, p.text) for p in passages]
    assert parse_reply(build_reply(wanted, [passages]), 1, 9) == [wished]
