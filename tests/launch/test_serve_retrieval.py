import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.serve_retrieval import FLAGS, JsonLines, build_settings, open_socket
from tests.shared_data import FIXTURES

ROOT = Path(__file__).resolve().parents[2]
TITLED = f"bm25:{FIXTURES / 'corpus_titled.jsonl'}"
DEFAULTS = {name: default for name, default, _ in FLAGS} | {"index": TITLED}


def test_flags_become_settings(monkeypatch):
    monkeypatch.setenv("RLRAG_RETRIEVAL_TOKEN", "secret")
    settings = build_settings(DEFAULTS | {"topk": 7, "max_topk": 9, "error_rate": 0.5, "max_waiting": 3})
    assert (settings.default_k, settings.limits.k, settings.faults.error_rate) == (7, 9, 0.5)
    assert (settings.max_waiting, settings.token, settings.limits.body_bytes) == (3, "secret", 2**20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": ""}, "index is empty"),
        ({"workers": 0}, "workers is 0: give at least 1"),
        ({"max_queries": 0}, "the limit of queries is 0: give at least 1"),
        ({"topk": 5000}, "topk is 5000: give a number from 1 to 1000"),
        ({"error_rate": 1.5}, "error_rate is 1.5"),
    ],
)
def test_wrong_flags_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build_settings(DEFAULTS | change)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port} \(Address already in use\)"):
            open_socket("127.0.0.1", port, -1)
        command = [sys.executable, "-m", "launch.serve_retrieval", f"--index={TITLED}", f"--port={port}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "cannot listen on" in done.stderr and done.stderr.count("\n") == 1
        with open_socket("", 0, socket.dup(taken.fileno())) as inherited:
            assert inherited.getsockname()[1] == port and inherited.family == socket.AF_INET


@pytest.mark.parametrize(
    ("index", "message"),
    [("nowhere", "nowhere is no index (none there)"), ("bm25:nowhere.jsonl", "nowhere.jsonl is no file")],
)
def test_an_index_that_is_not_there_is_one_line(index, message):
    command = [sys.executable, "-m", "launch.serve_retrieval", f"--index={index}", "--port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_logs_are_one_json_object_a_line():
    record = logging.makeLogRecord({"msg": "answered %d", "args": (3,), "levelno": 20, "levelname": "INFO", "k": 5})
    fields = json.loads(JsonLines().format(record))
    assert (fields["message"], fields["level"], fields["k"]) == ("answered 3", "info", 5)
    assert set(fields) == {"time", "level", "process", "message", "k"}
    try:
        raise RuntimeError("broken\nin two")
    except RuntimeError:
        failed = logging.makeLogRecord({"msg": "no", "levelname": "ERROR", "exc_info": sys.exc_info()})
    line = JsonLines().format(failed)
    assert "\n" not in line and "broken" in json.loads(line)["traceback"]
