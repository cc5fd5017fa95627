import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlrag.retrieval.milvus import fill_milvus
from rlrag.retrieval.milvus_collection import TOKEN, literal
from rlrag.trajectory import SearchUnavailable
from tests.conftest import REPOSITORY
from tests.retrieval.milvus_places import Words, corpus, on_file, on_server


@on_file
def test_a_file_is_open_in_one_process_at_a_time(place):
    encoder = Words()
    place.fill(corpus(10), encoder)
    script = f"import milvus_lite\nmilvus_lite.MilvusLite({place.uri!r})\nprint('open', flush=True)\ninput()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline() == b"open\n"  # so fill_milvus gave it up
        with pytest.raises(SearchUnavailable, match="one process at a time may have it open") as told:
            place.open(encoder)
        assert "\n" not in told.value.reason
        assert "lock" in told.value.reason.lower()
        other.communicate(b"\n")
    one, two = place.open(encoder), place.open(encoder)  # within a process, it may be open twice
    one.close()
    assert two.search(["w1"], 1)
    two.close()


SERVE = """
import sys
from milvus_lite.adapter.grpc.server import start_server_in_thread
server, _, port = start_server_in_thread(sys.argv[1], port=int(sys.argv[2]))
print(port, flush=True)
server.wait_for_termination()
"""


@on_file
def test_a_server_that_hangs_or_dies_is_told_in_time_and_comes_back(place):
    arguments = [sys.executable, "-c", SERVE, place.uri]
    with subprocess.Popen([*arguments, "0"], stdout=subprocess.PIPE) as server:
        place.uri = f"http://127.0.0.1:{int(server.stdout.readline())}"
        encoder = Words()
        place.fill(corpus(10), encoder)
        index = place.open(encoder, timeout_s=0.5)
        before = index.search(["w1"], 1)
        for trouble, again in ((signal.SIGSTOP, signal.SIGCONT), (signal.SIGKILL, None)):
            server.send_signal(trouble)
            with ThreadPoolExecutor(8) as pool:
                for seconds, reason in pool.map(lambda _: _reason(index), range(8)):
                    assert reason.startswith(f"collection {place.collection!r} at http://127.0.0.1:")
                    assert re.search("no answer in time" if again else "failed: .*server unavailable", reason)
                    assert "\n" not in reason
                    assert seconds < 3
            if again is not None:
                server.send_signal(again)
                assert _until_found(index)
        with pytest.raises(SearchUnavailable, match=r"connecting failed"):
            place.open(encoder, timeout_s=0.5)
    port = place.uri.rpartition(":")[2]
    with subprocess.Popen([*arguments, port], stdout=subprocess.PIPE) as server:  # it comes back, nothing loaded
        assert server.stdout.readline()
        assert [p.id for p in _until_found(index)[0]] == [p.id for p in before[0]]
        index.close()
        server.kill()


def _reason(index):
    start = time.perf_counter()
    with pytest.raises(SearchUnavailable) as told:
        index.search(["w1"], 1)
    return time.perf_counter() - start, told.value.reason


def _until_found(index):
    for _ in range(20):
        try:
            return index.search(["w1"], 1)
        except SearchUnavailable:
            time.sleep(0.1)


@on_server
def test_a_server_s_token_is_read_from_the_environment(place, monkeypatch):
    place.fill(corpus(10), Words())
    monkeypatch.setenv(TOKEN, "root:wrong")
    with pytest.raises(ValueError, match="wants a token, and that in MILVUS_TOKEN is refused: set it to") as told:
        place.open(Words())
    assert "wrong" not in str(told.value)
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ValueError, match="MILVUS_TOKEN is not set"):
        place.open(Words())


@pytest.mark.parametrize("package", ["pymilvus", "milvus_lite"])
def test_missing_packages_are_named_with_the_remedy(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=r"packages that are not installed \(.*milvus.*\): pip install 'rlrag\[milvus\]'"
    ):
        fill_milvus(corpus(2), Words(), str(tmp_path / "x.db"), "wiki")


def test_importing_loads_no_package_of_the_extra():
    script = (
        "import sys, rlrag.retrieval.milvus\nassert not {'pymilvus', 'milvus_lite', 'grpc', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)


def test_a_literal_holds_whatever_stands_in_it():
    assert literal('a"b\\c\n\r\t') == r'"a\"b\\c\n\r\t"'
    assert literal("é😀") == '"é😀"'
