import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlrag.retrieval.remote import HttpIndex, Policy, complete
from rlrag.retrieval.server import Faults, Settings
from rlrag.retrieval.wire import DIALECTS
from rlrag.trajectory import SearchUnavailable
from tests.retrieval.serving import Echo, serving

QUICK = Policy(attempt_s=1.0, first_wait_s=0.01, longest_wait_s=0.05, breaker_s=0.05)


def contents(results):
    return [[(passage.title, passage.text) for passage in passages] for passages in results]


@pytest.fixture(scope="module")
def url():
    with serving(Echo(), Settings(default_k=2)) as url:
        yield url


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_finds_the_same(url, dialect):
    index = HttpIndex([url], dialect=dialect)
    queries = [f"{dialect} {number}" for number in range(150)]  # several requests
    assert contents(index.search(queries, 2)) == contents(Echo().search(queries, 2))
    assert index.search([], 2) == []
    index.close()


def test_scores_ids_and_scopes_arrive(url):
    index = HttpIndex([url])
    assert index.search(["a", "b"], 3, ["s", None]) == Echo().search(["a", "b"], 3, ["s", None])


class Scripted(BaseHTTPRequestHandler):
    """Answers /retrieve by its server's script: a status, a stall in seconds, or None: as it should."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(404 if self.server.foreign else 200, {})  # type: ignore[attr-defined]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked.append(dict(self.headers))  # type: ignore[attr-defined]
        act = server.script.pop(0) if server.script else None  # type: ignore[attr-defined]
        if isinstance(act, float):
            time.sleep(act)
        elif isinstance(act, bytes):
            self.reply(200, act)
            return
        elif isinstance(act, int):
            self.reply(act, {"detail": f"scripted {act}"}, retry_after="0.01" if act == 429 else None)
            return
        self.reply(200, {"result": [[{"document": {"id": q, "contents": q}, "score": 1.0}] for q in body["queries"]]})

    def reply(self, status, value, retry_after=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def scripted():
    """Starts servers of other people: scripted(script) -> (url, what they were asked)."""
    servers = []

    def start(*script, foreign=False):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.script, server.asked, server.foreign = list(script), [], foreign  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_may_pass_is_tried_again(scripted):
    url, asked = scripted(500, 429, 503, b"oops", b'{"result": []}')
    index = HttpIndex([url], policy=QUICK, token="secret")
    assert [p.id for p in index.search(["a"], 1)[0]] == ["a"]
    assert len(asked) == 6 and {headers["Authorization"] for headers in asked} == {"Bearer secret"}
    metrics = index.metrics()
    assert (metrics["attempts"], metrics["retries"], metrics["busy"], metrics["failed_attempts"]) == (6, 5, 1, 4)


def test_a_stalled_attempt_is_given_up_and_tried_again(scripted):
    url, asked = scripted(0.5)
    index = HttpIndex([url], policy=Policy(attempt_s=0.1, first_wait_s=0.01))
    begin = time.perf_counter()
    assert index.search(["a"], 1)[0][0].id == "a"
    assert time.perf_counter() - begin < 0.45 and len(asked) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, r"refused the search \(400\): .*scripted 400"), (401, r"wants another token \(401\): set the environment")],
)
def test_what_cannot_pass_is_told_at_once(scripted, status, message):
    url, asked = scripted(status)
    with pytest.raises(ValueError, match=message):
        HttpIndex([url], policy=QUICK).search(["a"], 1)
    assert len(asked) == 1


def test_after_the_deadline_the_search_is_unavailable(scripted):
    """Never an empty list: the reason, and how often it was tried."""
    url, _ = scripted(*[500] * 1000)
    begin = time.perf_counter()
    with pytest.raises(SearchUnavailable, match=r"\(\d+ attempt\(s\) within 0.3 s\)"):
        HttpIndex([url], policy=Policy(first_wait_s=0.02, breaker_failures=1000), deadline_s=0.3).search(["a"], 1)
    assert 0.05 < time.perf_counter() - begin < 0.6
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(SearchUnavailable, match="attempt"):
        HttpIndex([f"http://127.0.0.1:{port}"], policy=QUICK, deadline_s=0.2).search(["a"], 1)


def test_a_retry_budget_ends_retries(scripted):
    url, asked = scripted(*[500] * 1000)
    policy = Policy(first_wait_s=0.001, longest_wait_s=0.002, retries_free=5.0, retry_share=0.5, breaker_failures=1000)
    index = HttpIndex([url], policy=policy, deadline_s=20)
    for _ in range(10):
        with pytest.raises(SearchUnavailable):
            index.search(["a"], 1)
    assert len(asked) == 10 + 5 + 10 * 0.5


def test_a_failing_server_is_left_alone_until_it_is_ready(scripted):
    bad, asked = scripted(*[500] * 8)
    index = HttpIndex([bad], policy=Policy(first_wait_s=0.001, longest_wait_s=0.01, breaker_failures=3, breaker_s=0.1))
    begin = time.perf_counter()
    assert index.search(["a"], 1)[0][0].id == "a"
    # 3 failures, left alone for 0.1 s, 3 more, again, 2 more and an answer.
    assert len(asked) == 9 and 0.2 <= time.perf_counter() - begin < 2
    assert index.metrics()["breaker_openings"] == 2 and index.metrics()["servers_down"] == 0


def test_others_take_over(scripted):
    bad, asked_bad = scripted(*[500] * 1000)
    good, asked_good = scripted(foreign=True)
    index = HttpIndex([bad, good], policy=Policy(first_wait_s=0.001, breaker_failures=3, breaker_s=30))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: index.search([str(i)], 1)[0][0].id, range(100)))
    assert found == [str(i) for i in range(100)]
    assert 3 <= len(asked_bad) <= 12 and len(asked_good) == 100
    assert index.metrics()["servers_down"] == 1
    index.close()


def test_the_server_with_the_fewest_requests_is_asked(scripted):
    slow, asked_slow = scripted(*[1.0] * 2)
    quick, asked_quick = scripted()
    index = HttpIndex([slow, quick])
    with ThreadPoolExecutor(4) as pool:  # until both slow ones are through, two at least are asked of the quick one
        list(pool.map(lambda i: index.search([str(i)], 1), range(60)))
    assert len(asked_slow) < 30 and len(asked_slow) + len(asked_quick) == 60
    even = HttpIndex([slow, quick])
    before = len(asked_slow), len(asked_quick)
    for i in range(10):
        even.search([str(i)], 1)
    assert (len(asked_slow) - before[0], len(asked_quick) - before[1]) == (5, 5)


def test_thirty_percent_errors_and_stalls_lose_nothing():
    trouble = Faults(error_rate=0.3, stall_rate=0.05, stall_s=0.3, seed=1)
    policy = Policy(attempt_s=0.2, first_wait_s=0.005, longest_wait_s=0.05)
    with serving(Echo(), Settings(faults=trouble)) as url, ThreadPoolExecutor(16) as pool:
        index = HttpIndex([url], policy=policy, deadline_s=20)
        found = list(pool.map(lambda i: index.search([f"q{i}"], 2), range(120)))
        metrics = index.metrics()
        index.close()
    assert found == [Echo().search([f"q{i}"], 2) for i in range(120)]
    assert 30 <= metrics["failed_attempts"] <= 120


def test_waiting_until_a_server_is_ready(scripted):
    url, _ = scripted(foreign=True)
    HttpIndex([url]).wait_ready(1.0)
    go = threading.Event()

    def opener():
        go.wait(5)
        return Echo()

    with serving(opener) as url:
        with pytest.raises(ValueError, match=rf"{url}/retrieve is not ready after 0.1 s: .*the index is being opened"):
            HttpIndex([url]).wait_ready(0.1)
        threading.Timer(0.1, go.set).start()
        HttpIndex([url]).wait_ready(5.0)


def test_addresses():
    assert complete("http://a:1") == complete("http://a:1/") == "http://a:1/retrieve"
    assert complete(" https://a/search/retrieve ") == "https://a/search/retrieve"
    for wrong in ("", "a:8000", "ftp://a", "http://"):
        with pytest.raises(ValueError, match="give http://host:port"):
            complete(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "url is empty"),
        ({"dialect": "soap"}, "dialect is 'soap': choose search_r1, skyrl"),
        ({"deadline_s": 0}, "deadline_s is 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HttpIndex(**{"urls": ["http://a"], **options})


def test_wrong_policies_are_named():
    with pytest.raises(ValueError, match="attempt_s is 0"):
        Policy(attempt_s=0)
    with pytest.raises(ValueError, match="breaker_failures 0"):
        Policy(breaker_failures=0)
