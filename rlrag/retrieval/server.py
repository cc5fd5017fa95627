"""The retrieval server: an ASGI application over an index (rlrag/retrieval/wire.py has what it speaks).

    POST /retrieve   GET /health (the process lives)   GET /ready (it answers searches)   GET /metrics (Prometheus)

Every error is {"detail": reason} with a status of 400 or above: nothing that failed looks like an empty result.
JAX is not imported here; an index whose encoder needs it brings it.
"""

import asyncio
import hmac
import json
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from rlrag.retrieval.batching import Batcher
from rlrag.retrieval.index import Index, Reranked, rerank
from rlrag.retrieval.wire import Limits, Refused, Wanted, build_reply, parse_request

log = logging.getLogger("rlrag.retrieval")
JSON = "application/json"
READ_AND_DROP = 64 * 2**20  # bytes of a body too large that are still read, so that its sender hears why
BODY_S = 10.0  # a body that takes longer is given up
TELL_EVERY_S = 30.0
COUNTED = ("queries", "cache_hits", "joined", "expired")  # of a batcher's totals
LOGGED_EACH_S = 10  # failures told in a second; the rest is counted


@dataclass
class Faults:
    """Trouble on purpose, for tests and measurements: every request waits latency_s plus a share of jitter_s; a share
    of error_rate is answered by 500; a share of stall_rate waits stall_s more."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    error_rate: float = 0.0
    stall_rate: float = 0.0
    stall_s: float = 2.0
    seed: int = 0

    def __post_init__(self):
        for name in ("error_rate", "stall_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        for name in ("latency_s", "jitter_s", "stall_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give seconds of at least 0")
        self._dice = random.Random(self.seed)

    async def strike(self) -> None:
        wait_s = self.latency_s + self.jitter_s * self._dice.random()
        if self._dice.random() < self.stall_rate:
            wait_s += self.stall_s
        if wait_s:
            await asyncio.sleep(wait_s)
        if self._dice.random() < self.error_rate:
            raise Refused(500, f"injected failure (error_rate {self.error_rate:g})")


@dataclass
class Settings:
    """deadline_s: of a request, unless its header `X-Deadline-S` gives it less. token: what `Authorization: Bearer`
    must say; empty: nothing. log_requests: a line for every request, not only for failures."""

    default_k: int = 3
    deadline_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
    max_batch: int = 256
    max_waiting: int = 8192
    batch_wait_s: float = 0.0
    threads: int = 1
    cache_size: int = 65536
    token: str = ""
    log_requests: bool = False
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self):
        if not 1 <= self.default_k <= self.limits.k:
            raise ValueError(f"topk is {self.default_k}: give a number from 1 to {self.limits.k}")
        if self.deadline_s <= 0:
            raise ValueError(f"deadline_s is {self.deadline_s}: give a positive number of seconds")


class Measures:
    """What /metrics tells. With several workers prometheus_client adds up their files (PROMETHEUS_MULTIPROC_DIR)."""

    def __init__(self, registry: CollectorRegistry):
        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"retrieval_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by status", ("status",))
        self.queries = counter("queries", "Queries that were taken on")
        self.cache_hits = counter("cache_hits", "Queries answered from the cache")
        self.joined = counter("joined", "Queries that shared the search of another request")
        self.expired = counter("expired", "Queries whose deadline passed in the queue")
        latency = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        self.seconds = Histogram("retrieval_request_seconds", "Of a request", buckets=latency, registry=registry)
        self.search = Histogram("retrieval_search_seconds", "Of a search", buckets=latency, registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.batch = Histogram("retrieval_batch_queries", "Queries of a search", buckets=sizes, registry=registry)
        self.waiting = Gauge(
            "retrieval_waiting_queries", "In the queue", registry=registry, multiprocess_mode="livesum"
        )


def build_app(
    open_index: Callable[[], Index],
    settings: Settings,
    expose: Callable[[CollectorRegistry], CollectorRegistry] = lambda own: own,
) -> Starlette:
    """open_index: called in a thread when the server starts; until it returns /ready says 503. expose: the registry
    that /metrics shows, given the one that is written to."""
    service = Service(settings, CollectorRegistry())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        opening = asyncio.create_task(service.open(open_index))
        telling = asyncio.create_task(service.tell())
        yield
        log.info("draining")
        service.close()
        for task in (opening, telling):
            task.cancel()

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(expose(service.registry)), media_type=CONTENT_TYPE_LATEST)

    async def health(request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type=JSON)

    async def ready(request: Request) -> Response:
        if service.plain is None:
            return refuse(Refused(503, service.state, 1.0))
        return Response(b'{"status":"ready"}', media_type=JSON)

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refuse(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    async def unforeseen(request: Request, error: Exception) -> Response:
        log.exception("a request failed", exc_info=error)
        return refuse(Refused(500, f"{type(error).__name__}: {error}"))

    return Starlette(
        routes=[
            Route("/retrieve", service.retrieve, methods=["POST"]),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: other, Exception: unforeseen},
        lifespan=lifespan,
    )


class Service:
    """What lives as long as a server's process."""

    def __init__(self, settings: Settings, registry: CollectorRegistry):
        self.settings, self.registry = settings, registry
        self.measures = Measures(registry)
        self.plain: Batcher | None = None  # the index
        self.ranked: Batcher | None = None  # with its reranking; the same where there is none
        self.state = "the index is being opened"
        self.answered = 0
        self._seen: dict[int, dict[str, int]] = {}  # of each batcher, what the counters have of its totals
        self._told = [0, 0.0]  # failures told in the second that began then

    async def open(self, open_index: Callable[[], Index]) -> None:
        begin = time.perf_counter()
        try:
            index = await asyncio.get_running_loop().run_in_executor(None, open_index)
        except Exception as error:
            self.state = f"the index cannot be opened: {error}"
            log.critical(self.state)
            raise
        self.ranked = self._batcher(index)
        self.plain = self._batcher(index.index) if isinstance(index, Reranked) else self.ranked
        log.info("ready", extra={"seconds": round(time.perf_counter() - begin, 2)})

    def _batcher(self, index: Index) -> Batcher:
        s = self.settings
        return Batcher(index, s.max_batch, s.max_waiting, s.batch_wait_s, s.threads, s.cache_size, self._searched)

    def _searched(self, queries: int, seconds: float) -> None:
        self.measures.batch.observe(queries)
        self.measures.search.observe(seconds)

    def close(self) -> None:
        for batcher in (self.plain, self.ranked):
            if batcher is not None:
                batcher.close()

    async def retrieve(self, request: Request) -> Response:
        begin = time.perf_counter()
        wanted, reason = None, ""
        try:
            self._authorize(request)
            body = await self._read(request)
            wanted = parse_request(body, self.settings.limits, self.settings.default_k)
            await self.settings.faults.strike()
            response = Response(await self._answer(wanted, self._deadline(request)), media_type=JSON)
        except Refused as refused:
            reason, response = refused.reason, refuse(refused)
        except ClientDisconnect:
            reason, response = "the client left", Response(status_code=499)
        seconds = time.perf_counter() - begin
        self.answered += 1
        self._count()
        self.measures.requests.labels(str(response.status_code)).inc()
        self.measures.seconds.observe(seconds)
        if self.settings.log_requests or (response.status_code >= 400 and self._may_tell()):
            log.log(
                logging.WARNING if response.status_code >= 500 else logging.INFO,
                reason or "answered",
                extra={
                    "status": response.status_code,
                    "seconds": round(seconds, 5),
                    "queries": len(wanted.queries) if wanted else None,
                    "k": wanted.k if wanted else None,
                    "client": request.client.host if request.client else None,
                },
            )
        return response

    def _authorize(self, request: Request) -> None:
        wanted = self.settings.token
        given = request.headers.get("authorization", "")
        if wanted and not hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            raise Refused(401, "this server wants a token: send Authorization: Bearer TOKEN")

    def _deadline(self, request: Request) -> float:
        given = request.headers.get("x-deadline-s")
        if given is None:
            return self.settings.deadline_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise Refused(400, f"X-Deadline-S is {given[:40]!r}: give a positive number of seconds")
        return min(seconds, self.settings.deadline_s)

    async def _read(self, request: Request) -> bytes:
        """The body; one too large is read to its end (within reason) and refused."""
        most, parts, size = self.settings.limits.body_bytes, [], 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > READ_AND_DROP:
                        break
        except TimeoutError:
            raise Refused(408, f"the body did not come within {BODY_S:g} s") from None
        if size > most:
            raise Refused(413, f"the body has {size if size <= READ_AND_DROP else 'too many'} bytes: at most {most}")
        return b"".join(parts)

    async def _answer(self, wanted: Wanted, deadline_s: float) -> bytes:
        if self.plain is None or self.ranked is None:
            raise Refused(503, self.state, 1.0)
        batcher = self.ranked if wanted.retrieve is None else self.plain
        found = await batcher.search(wanted.queries, wanted.retrieve or wanted.k, wanted.scopes, deadline_s)
        if wanted.retrieve is not None:
            found = await self._rerank(wanted, found)
        return build_reply(wanted, found)

    async def _rerank(self, wanted: Wanted, found):
        """The best k of what was retrieved: by the reranking function, or as retrieved where there is none."""
        index = self.ranked.index if self.ranked else None
        if not isinstance(index, Reranked):
            return [passages[: wanted.k] for passages in found]

        def work():
            return [rerank(index.rerank, query, list(passages)) for query, passages in zip(wanted.queries, found)]

        ranked = await asyncio.get_running_loop().run_in_executor(None, work)
        return [passages[: wanted.k] for passages in ranked]

    def _count(self) -> None:
        """Bring the counters up to the batchers' totals."""
        for batcher in {id(b): b for b in (self.plain, self.ranked) if b is not None}.values():
            seen = self._seen.setdefault(id(batcher), {})
            for name in COUNTED:
                total = getattr(batcher.totals, name)
                getattr(self.measures, name).inc(total - seen.get(name, 0))
                seen[name] = total
            self.measures.waiting.set(batcher.totals.waiting)

    async def tell(self) -> None:
        """A line now and then, while there is something to tell."""
        told = 0
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            if self.ranked is not None and self.answered > told:
                t = self.ranked.totals
                rate = (self.answered - told) / TELL_EVERY_S
                told = self.answered
                values = {"requests_per_s": round(rate, 1), "requests": told, "queries": t.queries}
                values |= {"cache_hits": t.cache_hits, "searched": t.searched, "batches": t.batches}
                log.info("serving", extra=values | {"waiting": t.waiting})

    def _may_tell(self) -> bool:
        now = time.monotonic()
        if now - self._told[1] >= 1:
            self._told = [0, now]
        self._told[0] += 1
        return self._told[0] <= LOGGED_EACH_S


def refuse(refused: Refused) -> Response:
    """An error as every client understands it."""
    headers = {}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(refused.retry_after_s))
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps({"detail": refused.reason}).encode()
    return Response(body, refused.status, headers, media_type=JSON)
