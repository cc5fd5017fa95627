"""Serve an index: python -m launch.serve_retrieval --index=DIR --port=8000

--index: a directory that launch.build_index made; several joined by commas, fused by reciprocal rank; bm25:FILE, a
corpus indexed in memory; milvus:URI/COLLECTION; or world:NAME?..., the passages of a world. POST /retrieve takes every
dialect of rlrag/retrieval/wire.py. A token, if there is to be one, is read from the environment variable
RLRAG_RETRIEVAL_TOKEN. SIGTERM answers what is on its way and ends.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from absl import flags

from launch.flags import run

SETTINGS = "RLRAG_RETRIEVAL_SETTINGS"  # environment: what the workers are to do, as JSON
TOKEN = "RLRAG_RETRIEVAL_TOKEN"
DRAIN_S = 30
FLAGS = (  # name, default, help
    ("rerank", "", "module:function(query, passages) -> scores, or `encoder`."),
    ("encoder", "", "Hugging Face directory, `minilm` or module:function; empty: the one that the index names."),
    ("host", "127.0.0.1", "Address to listen on."),
    ("port", 8000, "Port; 0: any that is free."),
    ("fd", -1, "File descriptor of a listening socket, instead of host and port."),
    ("workers", 1, "Processes. They share the index's files in memory."),
    ("topk", 3, "Passages for a request that does not say."),
    ("on_device", "", "Search flat indexes on this machine's devices, rows as float32, bfloat16, float16 or int8."),
    ("depth", 100, "Passages that fusing and reranking begin with."),
    ("deadline_s", 10.0, "Seconds a request may take."),
    ("max_batch", 256, "Queries a search."),
    ("max_waiting", 8192, "Queries that may wait in a worker; more are answered by 429."),
    ("batch_wait_s", 0.0, "How long a search that is not full waits for others to join."),
    ("threads", 1, "Searches at once in a worker."),
    ("cache_size", 65536, "Answers a worker keeps."),
    ("max_topk", 1000, "Most passages a query."),
    ("max_queries", 1024, "Most queries a request."),
    ("max_query_characters", 8192, "Longest query."),
    ("max_body_bytes", 2**20, "Largest body."),
    ("log_requests", False, "A log line for every request."),
    ("verify", False, "Hash the passages of the index when it is opened."),
    ("end_with_stdin", False, "End when standard input does: with the process that started this one."),
    ("latency_s", 0.0, "Injected into every request, for measurements."),
    ("jitter_s", 0.0, "Injected: a share of it is added."),
    ("error_rate", 0.0, "Injected: share of requests answered by 500."),
    ("stall_rate", 0.0, "Injected: share of requests that wait stall_s."),
    ("stall_s", 2.0, "Injected."),
)
DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("index", None, "What to serve.", flag_values=values)
    for name, default, text in FLAGS:
        DEFINE[type(default)](name, default, text, flag_values=values)


def main(values: flags.FlagValues) -> None:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from rlrag.retrieval.directory import check_source

    settings = {name: getattr(values, name) for name, _, _ in FLAGS} | {"index": values.index}
    build_settings(settings)  # what is wrong is told before anything starts
    check_source(values.index, values.on_device)
    listening = open_socket(values.host, values.port, values.fd)
    host, port = listening.getsockname()[:2]
    os.environ[SETTINGS] = json.dumps(settings)
    if values.end_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    config = uvicorn.Config(
        "launch.serve_retrieval:app", factory=True, workers=values.workers, log_config=None, access_log=False,
        timeout_graceful_shutdown=DRAIN_S, timeout_keep_alive=75, backlog=4096, lifespan="on", server_header=False,
    )  # fmt: skip
    print(
        f"serving {values.index} on http://{host}:{port}, {values.workers} worker(s), process {os.getpid()}", flush=True
    )
    if values.workers == 1:
        uvicorn.Server(config).run(sockets=[listening])
        return
    with tempfile.TemporaryDirectory(prefix="rlrag-metrics-") as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared  # before a worker imports prometheus_client
        Multiprocess(config, sockets=[listening]).run()


def open_socket(host: str, port: int, fd: int) -> socket.socket:
    if fd >= 0:
        return socket.socket(fileno=fd)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}): choose another --host or --port"
        ) from None


def end_with_stdin() -> None:
    """The process that started this one holds the other end of a pipe: when it ends, however it does, so do we."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def build_settings(fields: dict[str, Any]) -> Any:
    from rlrag.retrieval.server import Faults, Settings
    from rlrag.retrieval.wire import Limits

    if not fields["index"]:
        raise ValueError("index is empty: give --index=DIR")
    if fields["workers"] < 1:
        raise ValueError(f"workers is {fields['workers']}: give at least 1")
    limits = Limits(fields["max_body_bytes"], fields["max_queries"], fields["max_query_characters"], fields["max_topk"])
    for name, value in asdict(limits).items():
        if value < 1:
            raise ValueError(f"the limit of {name} is {value}: give at least 1")
    injected = ("latency_s", "jitter_s", "error_rate", "stall_rate", "stall_s")
    same = ("deadline_s", "max_batch", "max_waiting", "batch_wait_s", "threads", "cache_size", "log_requests")
    return Settings(
        default_k=fields["topk"],
        limits=limits,
        token=os.environ.get(TOKEN, ""),
        faults=Faults(**{name: fields[name] for name in injected}),
        **{name: fields[name] for name in same},
    )


def app() -> Any:
    """The application of one worker process."""
    from prometheus_client import CollectorRegistry, multiprocess

    from rlrag.retrieval.directory import open_index
    from rlrag.retrieval.server import build_app

    fields = json.loads(os.environ[SETTINGS])
    log_as_json()
    if fields["end_with_stdin"]:
        threading.Thread(target=end_with_stdin, daemon=True).start()

    def opened() -> Any:
        if fields["index"].startswith("world:"):
            from rlrag.data.task import parse_world

            return parse_world(fields["index"])[0].index()
        return open_index(
            fields["index"], encoder=fields["encoder"], rerank=fields["rerank"], depth=fields["depth"],
            verify=fields["verify"], on_device=fields["on_device"],
        )  # fmt: skip

    def all_workers(own: CollectorRegistry) -> CollectorRegistry:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # adds itself
        return registry

    several = "PROMETHEUS_MULTIPROC_DIR" in os.environ
    return build_app(opened, build_settings(fields), all_workers if several else lambda own: own)


def log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    logging.getLogger("rlrag.retrieval").setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, process, message, and whatever came along as `extra`."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "process": record.process,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in self.STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in fields.items() if value is not None}, default=str)


if __name__ == "__main__":
    run(main, define_flags, required={"index": "runs/index"}, doc=__doc__, interrupted="interrupted")
