"""Searching over the network: one server or several, that may be slow, restart, or be overrun.

A request goes to the server with the fewest requests on their way. What fails for a reason that may pass is tried
again, elsewhere where there is an elsewhere, after a wait that grows and is drawn at random, until the deadline; a
retry budget keeps a failing service from being asked ever more. A server that failed several times in a row is left
alone for a while (circuit breaker), then probed. What cannot be answered in time raises SearchUnavailable: the episode
is told, marked, and left out of the update. Nothing that failed is ever an empty list.
"""

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import tenacity
import urllib3
from urllib3.util import parse_url

from rlrag.retrieval.index import check_request
from rlrag.retrieval.wire import DIALECTS, build_requests, parse_reply
from rlrag.trajectory import Passage, SearchUnavailable

TOKEN = "RLRAG_RETRIEVAL_TOKEN"  # environment: what the servers want as bearer token
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may pass


class Passing(Exception):
    """A failure that may be none a moment later. after_s: when to ask again. free: costs none of the retry budget,
    since nobody was burdened, or a server asked for patience."""

    def __init__(self, reason: str, after_s: float = 0.0, free: bool = False):
        super().__init__(reason)
        self.after_s, self.free = after_s, free


@dataclass
class Policy:
    """When a request is tried again. attempt_s: seconds one attempt may take. first_wait_s, longest_wait_s: between
    attempts, drawn uniformly from 0 to a bound that doubles. retry_share: retries for each first attempt, beside
    `retries_free` at the start (429, by which a server asks for patience, costs nothing). breaker_failures: in a row,
    after which a server is left alone; every breaker_s it is asked whether it is ready again."""

    attempt_s: float = 10.0
    first_wait_s: float = 0.05
    longest_wait_s: float = 2.0
    retry_share: float = 1.0
    retries_free: float = 100.0
    breaker_failures: int = 5
    breaker_s: float = 2.0

    def __post_init__(self):
        for name in ("attempt_s", "first_wait_s", "longest_wait_s", "breaker_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number of seconds")
        if self.retry_share < 0 or self.retries_free < 0 or self.breaker_failures < 1:
            raise ValueError(
                f"retry_share is {self.retry_share}, retries_free {self.retries_free}, breaker_failures "
                f"{self.breaker_failures}: give numbers of at least 0, 0 and 1"
            )


@dataclass(eq=False)
class Server:
    """One of the servers, as this client sees it."""

    url: str
    outstanding: int = 0
    failures: int = 0  # in a row
    down: bool = False  # failed so often that it is left alone until its /ready answers


@dataclass
class Budget:
    """Retries that are still allowed."""

    share: float
    left: float
    most: float = field(init=False)

    def __post_init__(self):
        self.most = max(self.left, 1000 * self.share)

    def earn(self) -> None:
        self.left = min(self.most, self.left + self.share)

    def spend(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True


class HttpIndex:
    """The index behind one or several URLs, in any dialect of rlrag.retrieval.wire. Safe to search from many threads.

    urls: http://host:port, to which /retrieve is added where no path is given. deadline_s: seconds a search may take,
    all its attempts together. at_once: queries a request.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        dialect: str = "search_r1",
        deadline_s: float = 30.0,
        at_once: int = 64,
        connections: int = 64,
        policy: Policy | None = None,
        token: str | None = None,
        seed: int | None = None,
    ):
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is {dialect!r}: choose {', '.join(DIALECTS)}")
        if deadline_s <= 0 or at_once < 1:
            raise ValueError(f"deadline_s is {deadline_s}, at_once {at_once}: give positive numbers")
        self.servers = [Server(complete(url)) for url in urls]
        if not self.servers:
            raise ValueError("url is empty: give http://host:port, several joined by commas")
        self.dialect, self.deadline_s, self.at_once = dialect, deadline_s, at_once
        self.policy = policy or Policy()
        token = os.environ.get(TOKEN, "") if token is None else token
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._http = urllib3.PoolManager(len(self.servers), maxsize=connections, block=False, retries=False)
        self._budget = Budget(self.policy.retry_share, self.policy.retries_free)
        self._dice = random.Random(seed)
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._watching, self._closed = False, threading.Event()
        self._totals = dict.fromkeys(("attempts", "retries", "busy", "failed_attempts", "breaker_openings"), 0.0)

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """See Index.search. A request that the server refuses as wrong raises ValueError with the server's reason."""
        check_request(queries, k, scopes, scoped=True)
        until = time.monotonic() + self.deadline_s
        found: list[list[Passage]] = []
        for number, body in build_requests(self.dialect, queries, k, scopes, self.at_once):
            found += self._ask(number, body, k, until)
        return found

    def metrics(self) -> dict[str, float]:
        """Totals: attempts, retries among them, busy (429), failed_attempts, breaker_openings; servers_down now."""
        with self._lock:
            return self._totals | {"servers_down": float(sum(server.down for server in self.servers))}

    def close(self) -> None:
        self._closed.set()
        self._http.clear()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when every server answers; ValueError naming the one that does not in time, or wants a token."""
        until = time.monotonic() + timeout_s
        for server in self.servers:
            while True:
                state = self._probe(server)
                if state is None:
                    break
                if time.monotonic() >= until:
                    raise ValueError(f"the retrieval server {server.url} is not ready after {timeout_s:g} s: {state}")
                time.sleep(0.1)

    # -- one request --------------------------------------------------------------------------------------------------

    def _ask(self, number: int, body: bytes, k: int, until: float) -> list[list[Passage]]:
        """Try until it succeeds, cannot, or the deadline comes."""
        with self._lock:
            self._budget.earn()

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            after_s = error.after_s if isinstance(error, Passing) else 0.0
            bound = min(self.policy.longest_wait_s, self.policy.first_wait_s * 2 ** min(state.attempt_number - 1, 30))
            with self._lock:
                return after_s * (1 + 0.25 * self._dice.random()) + bound * self._dice.random()

        def stop(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if time.monotonic() + state.upcoming_sleep >= until:
                return True
            if isinstance(error, Passing) and error.free:
                return False
            with self._lock:
                return not self._budget.spend()

        retrying = tenacity.Retrying(
            wait=wait, stop=stop, retry=tenacity.retry_if_exception_type(Passing), before_sleep=self._count_retry
        )
        try:
            return retrying(self._attempt, number, body, k, until)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            tried = error.last_attempt.attempt_number
            raise SearchUnavailable(f"{last} ({tried} attempt(s) within {self.deadline_s:g} s)") from None

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self._totals["retries"] += 1

    def _attempt(self, number: int, body: bytes, k: int, until: float) -> list[list[Passage]]:
        left_s = min(self.policy.attempt_s, until - time.monotonic())
        if left_s <= 0:
            raise Passing("the deadline passed")
        with self._server() as server:
            with self._lock:
                self._totals["attempts"] += 1
            try:
                reply = self._http.request(
                    "POST", server.url, body=body, headers=self._headers | {"X-Deadline-S": f"{left_s:.3f}"},
                    timeout=urllib3.Timeout(total=left_s),
                )  # fmt: skip
            except urllib3.exceptions.HTTPError as error:
                raise Passing(f"{server.url}: {brief(error)}") from None
            if reply.status in AGAIN:
                raise Passing(
                    f"{server.url} answered {reply.status}: {reason(reply.data)}", after(reply), reply.status == 429
                )
            if reply.status in (401, 403):
                raise ValueError(
                    f"{server.url} wants another token ({reply.status}): set the environment variable {TOKEN}"
                )
            if reply.status != 200:
                raise ValueError(f"{server.url} refused the search ({reply.status}): {reason(reply.data)}")
            try:
                return parse_reply(reply.data, number, k)
            except ValueError as error:
                raise Passing(f"{server.url}: {error}") from None

    # -- which server -------------------------------------------------------------------------------------------------

    @contextmanager
    def _server(self) -> Iterator[Server]:
        """The server to ask now: of those that are up the one with the fewest requests on their way, in turn among
        equals. What comes of it counts. Raises Passing where none is up."""
        with self._lock:
            able = [server for server in self.servers if not server.down]
            if able:
                first = next(self._turn) % len(able)
                server = min(able[first:] + able[:first], key=lambda server: server.outstanding)
                server.outstanding += 1
        if not able:
            names = ", ".join(server.url for server in self.servers)
            raise Passing(f"{names}: failing, left alone for now", self.policy.breaker_s / 2, free=True)
        try:
            yield server
        except Passing as error:
            with self._lock:
                self._totals["busy" if error.free else "failed_attempts"] += 1
                server.failures = 0 if error.free else server.failures + 1
                if server.failures >= self.policy.breaker_failures and not server.down:
                    server.down = True
                    self._totals["breaker_openings"] += 1
                    self._watch()
            raise
        else:
            with self._lock:
                server.failures = 0
        finally:
            with self._lock:
                server.outstanding -= 1

    def _watch(self) -> None:
        """Ask servers that are left alone whether they are back, on a thread of its own, while there are any."""
        if self._watching:
            return
        self._watching = True
        threading.Thread(target=self._ask_those_down, name="retrieval-health", daemon=True).start()

    def _ask_those_down(self) -> None:
        while not self._closed.wait(self.policy.breaker_s):
            back = [server for server in self.servers if server.down and self._probe(server) is None]
            with self._lock:
                for server in back:
                    server.down, server.failures = False, 0
                if not any(server.down for server in self.servers):
                    self._watching = False
                    return

    def _probe(self, server: Server) -> str | None:
        """None where a server is ready, else why not. One that has no /ready is not ours: that it answers must do."""
        base = server.url.removesuffix("/retrieve")
        try:
            reply = self._http.request("GET", f"{base}/ready", headers=self._headers, timeout=urllib3.Timeout(total=5))
        except urllib3.exceptions.HTTPError as error:
            return brief(error)
        if reply.status == 503:
            return reason(reply.data)
        return None


def complete(url: str) -> str:
    """The address that searches are sent to."""
    try:
        parts = parse_url(url.strip())
    except urllib3.exceptions.LocationParseError:
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"url is {url!r}: give http://host:port, several joined by commas")
    return url.strip().rstrip("/") + ("" if (parts.path or "/") != "/" else "/retrieve")


def after(reply: urllib3.BaseHTTPResponse) -> float:
    """Seconds of Retry-After; 0 where there is none, or a date."""
    try:
        return min(60.0, max(0.0, float(reply.headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0


def reason(body: bytes) -> str:
    """What an error reply says, in one short line."""
    return " ".join(body[:500].decode(errors="replace").split())[:200]


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
