"""A retrieval server in a thread of the test, over any index."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import urllib3
import uvicorn

from rlrag.retrieval.server import Settings, build_app
from rlrag.trajectory import Passage

HTTP = urllib3.PoolManager(maxsize=32, retries=False)


class Echo:
    """Finds for each query k passages that name query, rank and scope; keeps the batches it was asked."""

    def __init__(self, act=lambda: None):
        self.act, self.batches = act, []

    def search(self, queries, k, scopes=None):
        self.batches.append(list(queries))
        self.act()
        if "refuse" in queries:
            raise ValueError("this index refuses `refuse`")
        scopes = scopes or [None] * len(queries)
        return [
            [Passage(f"{query}#{rank}", f"T {query}", f"text {rank} of {query} in {scope}", 1 / (rank + 1))
             for rank in range(k)]
            for query, scope in zip(queries, scopes)
        ]  # fmt: skip


@contextlib.contextmanager
def serving(index, settings: Settings | None = None, port: int = 0) -> Iterator[str]:
    """The server's address, once it is ready; it has ended afterwards."""
    listening = socket.create_server(("127.0.0.1", port))
    opener = index if callable(index) else lambda: index
    app = build_app(opener, settings or Settings())
    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]  # not the main thread
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        if not callable(index):
            until = time.monotonic() + 10
            while get(f"{url}/ready")[0] != 200:
                assert time.monotonic() < until
                time.sleep(0.005)
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def get(url: str, **headers: str) -> tuple[int, dict]:
    reply = HTTP.request("GET", url, headers=headers)
    return reply.status, json.loads(reply.data) if reply.headers["content-type"] == "application/json" else {}


def post(url: str, body: dict | list | bytes, **headers: str) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = HTTP.request("POST", f"{url}/retrieve", body=data, headers=headers, timeout=30.0)
    return reply.status, json.loads(reply.data)
