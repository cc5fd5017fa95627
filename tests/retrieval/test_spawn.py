import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlrag.retrieval.remote import HttpIndex, Policy
from rlrag.retrieval.spawn import SpawnedServer
from tests.retrieval.serving import HTTP
from tests.shared_data import FIXTURES

TITLED = f"--index=bm25:{FIXTURES / 'corpus_titled.jsonl'}"
PATIENT = Policy(attempt_s=5.0, first_wait_s=0.02, longest_wait_s=0.2, breaker_s=0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = SpawnedServer([TITLED, "--workers=2"], tmp_path_factory.mktemp("spawn") / "logs" / "server.log")
    yield server
    server.stop()
    assert not server.alive


def children(pid):
    """The workers of a server (Linux)."""
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in started if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_two_workers_serve_one_index(server):
    index = HttpIndex([server.url], policy=PATIENT)
    index.wait_ready(60)
    assert [p.id for p in index.search(["Ada Holt"], 2)[0]] == ["b", "a"]
    for number in range(20):
        index.search([f"Marn {number}"], 1)
    text = HTTP.request("GET", f"{server.url}/metrics").data.decode()
    (total,) = [line for line in text.splitlines() if line.startswith('retrieval_requests_total{status="200"}')]
    assert float(total.split()[-1]) == 21  # over both
    assert "serving bm25:" in server.said()


def test_a_killed_worker_and_a_killed_server_lose_nothing(server):
    """Searches go on while a worker, then the whole server, is killed; what answers afterwards is another process."""
    index = HttpIndex([server.url], policy=PATIENT, deadline_s=60)
    index.wait_ready(60)
    workers = children(server._process.pid)
    assert len(workers) == 2
    for number in range(200):
        if number == 50:
            os.kill(workers[0], signal.SIGKILL)
        if number == 100:
            pid = server._process.pid
            for process in (*children(pid), pid):  # the workers first, or they would live on for a moment
                os.kill(process, signal.SIGKILL)
        assert [p.id for p in index.search([f"Ada {number}"], 1)[0]] == ["b"]
    assert server.restarts == 1
    index.close()


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from rlrag.retrieval.spawn import SpawnedServer\n"
        f"server = SpawnedServer([{TITLED!r}], pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(server.url, server._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url, pid = parent.stdout.readline().split()
    HttpIndex([url]).wait_ready(60)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and "Z" not in state(pid):
        assert time.monotonic() < until, "the server outlived its parent"
        time.sleep(0.05)


def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_sigterm_answers_what_is_on_its_way(tmp_path):
    server = SpawnedServer([TITLED, "--latency_s=0.5"], tmp_path / "log")
    HttpIndex([server.url]).wait_ready(60)
    process = server._process
    index = HttpIndex([server.url], policy=Policy(retries_free=0, retry_share=0))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(index.search, [f"Ada {i}"], 1) for i in range(4)]
        time.sleep(0.25)
        server._ending.set()  # it is not to be started again
        process.send_signal(signal.SIGTERM)
        assert [a.result()[0][0].id for a in asked] == ["b"] * 4
    assert process.wait(10) in (0, -signal.SIGTERM)
    server.stop()


def test_a_server_that_cannot_start_is_told(tmp_path):
    server = SpawnedServer(["--index=bm25:nowhere.jsonl"], tmp_path / "log")
    until = time.monotonic() + 30
    while "nowhere.jsonl is no file" not in server.said():
        assert time.monotonic() < until
        time.sleep(0.1)
    server.stop()
