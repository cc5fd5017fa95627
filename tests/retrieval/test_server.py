import json
import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlrag.retrieval.index import Reranked
from rlrag.retrieval.server import Faults, Settings
from rlrag.retrieval.wire import Limits
from tests.retrieval.serving import HTTP, Echo, get, post, serving


@pytest.fixture(scope="module")
def url():
    with serving(Echo(), Settings()) as url:
        yield url


def test_searches_and_their_metrics(url):
    body = {"queries": ["x", "y"], "topk": 2, "return_scores": True, "scopes": ["s", None]}
    status, reply = post(url, body)
    assert status == 200
    assert reply["result"][0][1] == {
        "document": {"id": "x#1", "contents": '"T x"\ntext 1 of x in s'},
        "score": 0.5,
    }
    assert reply["result"][1][0]["document"]["contents"] == '"T y"\ntext 0 of y in None'
    assert post(url, body) == (status, reply)
    assert len(post(url, {"query": "one"})[1]["result"][0]) == 3  # the server's own number
    text = HTTP.request("GET", f"{url}/metrics").data.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["retrieval_cache_hits_total"]) >= 2
    assert float(values['retrieval_requests_total{status="200"}']) >= 3
    assert float(values["retrieval_queries_total"]) >= 5
    assert float(values["retrieval_request_seconds_count"]) >= 3
    assert float(values["retrieval_batch_queries_count"]) >= 2
    assert get(f"{url}/health") == (200, {"status": "ok"})
    assert get(f"{url}/ready") == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"x" * 10_000_000, 413, "the body has 10000000 bytes: at most 1048576"),
        ({"queries": ["a" * 100_000]}, 400, "a query has 100000 characters: at most 8192"),
        ({"queries": []}, 400, "queries is []"),
        ({"queries": ["a"], "topk": 10**9}, 400, "topk is 1000000000: give a whole number from 1 to 1000"),
        ({"queries": [1]}, 400, "a query is 1: give a string"),
        ({"query": ["a"]}, 400, "a query is ['a']: give a string"),
        ({"queries": ["refuse"]}, 400, "this index refuses `refuse`"),
    ],
)
def test_what_is_wrong_is_told_as_json(url, body, status, reason):
    found, reply = post(url, body)
    assert found == status and reply["detail"].startswith(reason)
    assert post(url, {"queries": ["a"]})[0] == 200


def test_other_addresses_and_methods(url):
    assert get(f"{url}/retrieve") == (405, {"detail": "GET /retrieve: Method Not Allowed"})
    assert get(f"{url}/other") == (404, {"detail": "GET /other: Not Found"})
    assert post(url, {"queries": ["a"]}, **{"X-Deadline-S": "soon"})[0] == 400


def test_a_token_is_wanted_where_there_is_one():
    with serving(Echo(), Settings(token="secret")) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, reply = post(url, {"queries": ["a"]}, **headers)
            assert (status, reply["detail"]) == (401, "this server wants a token: send Authorization: Bearer TOKEN")
        assert post(url, {"queries": ["a"]}, Authorization="Bearer secret")[0] == 200
        assert get(f"{url}/ready")[0] == 200


def test_busy_and_late():
    """429 with Retry-After where the queue is full; 504 where the deadline passes, the header's included."""
    go = threading.Event()
    with (
        serving(Echo(lambda: go.wait(5)), Settings(max_waiting=1, deadline_s=3.0)) as url,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(post, url, {"queries": ["a"]})
        time.sleep(0.1)
        second = pool.submit(post, url, {"queries": ["b"]})
        time.sleep(0.1)
        reply = HTTP.request("POST", f"{url}/retrieve", body=b'{"queries": ["c"]}')
        assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
        assert json.loads(reply.data) == {"detail": "1 queries are waiting, the most there may be"}
        status, late = post(url, {"queries": ["a"]}, **{"X-Deadline-S": "0.05"})
        assert (status, late["detail"]) == (504, "no answer within 0.05 s")
        go.set()
        assert first.result()[0] == second.result()[0] == 200


def test_reranking():
    """`retrieve` passages are found, ordered anew, and the best returned; without a function they stay as found."""
    request = {"queries": ["q"], "topk_retrieval": 4, "topk_rerank": 2, "return_scores": True}
    last_first = Reranked(Echo(), lambda query, passages: range(len(passages)), depth=3)
    with serving(last_first) as url:
        result = post(url, request)[1]["result"][0]
        assert [(entry["document"].splitlines()[1][:6], entry["score"]) for entry in result] == [
            ("text 3", 3.0),
            ("text 2", 2.0),
        ]
        plain = post(url, {"queries": ["q"], "topk": 1, "return_scores": False})[1]["result"][0]
        assert plain[0]["id"] == "q#2"  # of the depth that the server reranks for everyone
    with serving(Echo()) as url:
        result = post(url, request)[1]["result"][0]
        assert [entry["document"].splitlines()[1][:6] for entry in result] == ["text 0", "text 1"]


def test_until_the_index_is_open_the_server_is_not_ready():
    go = threading.Event()

    def opener():
        go.wait(5)
        return Echo()

    with serving(opener) as url:
        assert get(f"{url}/health")[0] == 200
        assert get(f"{url}/ready") == (503, {"detail": "the index is being opened"})
        assert post(url, {"queries": ["a"]}) == (503, {"detail": "the index is being opened"})
        go.set()
        until = time.monotonic() + 5
        while get(f"{url}/ready")[0] != 200:
            assert time.monotonic() < until
        assert post(url, {"queries": ["a"]})[0] == 200


def test_an_index_that_cannot_be_opened_is_told(caplog):
    def opener():
        raise ValueError("there is none")

    with caplog.at_level(logging.CRITICAL), serving(opener) as url:
        until = time.monotonic() + 5
        while get(f"{url}/ready")[1]["detail"] != "the index cannot be opened: there is none":
            assert time.monotonic() < until
        assert get(f"{url}/ready")[0] == 503


def test_injected_trouble():
    with serving(Echo(), Settings(faults=Faults(latency_s=0.05, error_rate=0.5))) as url:
        begin = time.perf_counter()
        with ThreadPoolExecutor(20) as pool:
            statuses = list(pool.map(lambda i: post(url, {"queries": [str(i)]})[0], range(60)))
        assert 0.15 <= time.perf_counter() - begin < 3  # requests wait side by side
        assert 10 < statuses.count(500) < 50 and statuses.count(200) == 60 - statuses.count(500)
    for options, message in (({"error_rate": 2}, "error_rate is 2"), ({"latency_s": -1}, "latency_s is -1")):
        with pytest.raises(ValueError, match=message):
            Faults(**options)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="topk is 2000: give a number from 1 to 1000"):
        Settings(default_k=2000)
    with pytest.raises(ValueError, match="deadline_s is 0"):
        Settings(deadline_s=0)


def test_a_client_that_leaves_or_dawdles_costs_nothing(url, monkeypatch):
    monkeypatch.setattr("rlrag.retrieval.server.BODY_S", 0.2)
    port = int(url.rsplit(":", 1)[1])
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(head)
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(head)
        slow.settimeout(5)
        assert b" 408 " in slow.recv(4096).splitlines()[0]
    assert post(url, {"queries": ["a"]})[0] == 200


def test_failures_are_logged_but_not_all_of_a_flood(caplog):
    with caplog.at_level(logging.INFO, "rlrag.retrieval"), serving(Echo(), Settings()) as url:
        for _ in range(40):
            post(url, {"queries": []})
    told = [record for record in caplog.records if record.getMessage().startswith("queries is []")]
    assert 10 <= len(told) <= 20 and told[0].status == 400  # type: ignore[attr-defined]


def test_limits_are_the_settings_own():
    with serving(Echo(), Settings(limits=Limits(body_bytes=100, queries=2, query_characters=5, k=4))) as url:
        assert post(url, {"queries": ["a", "b", "c"]})[1]["detail"] == "queries has 3 entries: at most 2 a request"
        assert post(url, {"queries": ["abcdef"]})[1]["detail"] == "a query has 6 characters: at most 5"
        assert post(url, {"queries": ["a"], "topk": 5})[0] == 400
        assert post(url, {"queries": ["a"], "filler": "x" * 100})[0] == 413


def test_the_server_imports_no_jax():
    script = (
        "import sys, launch.serve_retrieval, rlrag.retrieval.server, rlrag.retrieval.directory, rlrag.retrieval.spawn\n"
        "import rlrag.retrieval.remote, rlrag.data.worlds.multihop\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'torch')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
