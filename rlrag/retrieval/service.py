"""The index that a configuration describes: in this process, on servers that run, or on one that is started for it."""

import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlrag.config import Retriever
from rlrag.retrieval.index import Index
from rlrag.retrieval.remote import HttpIndex, Policy
from rlrag.retrieval.spawn import SpawnedServer


@contextmanager
def open_remote(retriever: Retriever, served: str, directory: Path | None) -> Iterator[Index | None]:
    """The index behind `url`, or behind a server that is started with `spawn` for as long; None where neither is set.

    served: what a spawned server is to serve, as launch.serve_retrieval names it; its log goes to
    directory/retrieval_server.log. Raises ValueError where a server is not ready in time.
    """
    if not retriever.url and not retriever.spawn:
        yield None
        return
    with tempfile.TemporaryDirectory() as nowhere:
        server = None
        if retriever.spawn:
            flags = [f"--index={served}", f"--encoder={retriever.encoder}", f"--rerank={retriever.rerank}"]
            flags += [f"--depth={retriever.depth}", *shlex.split(retriever.spawn_flags)]
            server = SpawnedServer(flags, (directory or Path(nowhere)) / "retrieval_server.log")
        index = RemoteIndex(retriever, server)
        try:
            index.wait_ready(retriever.ready_s)
            yield index
        finally:
            index.close()
            if server is not None:
                server.stop()


class RemoteIndex(HttpIndex):
    """The servers of a configuration, the one that was started for it included."""

    def __init__(self, retriever: Retriever, server: SpawnedServer | None):
        self.server = server
        super().__init__(
            [server.url] if server else [url for url in retriever.url.split(",") if url.strip()],
            dialect=retriever.dialect,
            deadline_s=retriever.deadline_s,
            policy=Policy(attempt_s=retriever.attempt_s),
        )

    def wait_ready(self, timeout_s: float) -> None:
        """As HttpIndex.wait_ready; a started server that ends instead is told with what it said."""
        if self.server is None:
            return super().wait_ready(timeout_s)
        until = time.monotonic() + timeout_s
        while True:
            try:
                return super().wait_ready(0.0)
            except ValueError as error:
                if self.server.restarts or "cannot be opened" in str(error) or time.monotonic() > until:
                    raise ValueError(f"{error}; {self.server.log} ends with: {self.server.said()}") from None
                time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        return super().metrics() | ({"server_restarts": float(self.server.restarts)} if self.server else {})
