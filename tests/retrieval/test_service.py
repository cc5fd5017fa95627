import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rlrag.config import Retriever
from rlrag.dry_run import dry_run
from rlrag.retrieval import service
from rlrag.retrieval.service import open_remote
from rlrag.retrieval.spawn import SpawnedServer
from rlrag.train import train
from tests.experiments import taught, tiny
from tests.retrieval.serving import Echo, serving
from tests.test_train import rows_of, without_times


def test_without_a_server_there_is_nothing_remote():
    with open_remote(Retriever(), "world:multihop", None) as remote:
        assert remote is None


def test_servers_that_run_are_searched():
    with serving(Echo()) as url, open_remote(Retriever(url=f"{url},{url}/retrieve"), "", None) as remote:
        assert remote is not None
        assert remote.search(["a"], 2, ["s"]) == Echo().search(["a"], 2, ["s"])


def test_a_server_that_is_not_there_is_told():
    with (
        pytest.raises(ValueError, match=r"the retrieval server http://127.0.0.1:1/retrieve is not ready after 0.2 s"),
        open_remote(Retriever(url="http://127.0.0.1:1", ready_s=0.2), "", None),
    ):
        pass


@pytest.mark.parametrize("flags", ["--index=bm25:nowhere.jsonl", "--workers=0"])
def test_a_server_that_cannot_start_is_told_with_what_it_said(tmp_path, flags):
    settings = Retriever(spawn=True, spawn_flags=flags, ready_s=30)
    with (
        pytest.raises(ValueError, match=r"nowhere.jsonl is no file|workers is 0"),
        open_remote(settings, "x", tmp_path),
    ):
        pass


def short():
    experiment = taught()
    experiment.steps = 3
    return experiment


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("in_process")
    return directory, train(short(), directory)


def spawned(flags=""):
    experiment = short()
    experiment.retriever.spawn, experiment.retriever.spawn_flags = True, flags
    return experiment


def test_a_training_through_a_server_with_troubles_is_the_training_without(in_process, tmp_path):
    """Three in ten requests fail, some stall for longer than an attempt, and the server is killed in the middle:
    where trying again suffices nothing is lost, nothing doubled, and the same is learned."""
    directory, wanted = in_process
    experiment = spawned("--error_rate=0.3 --stall_rate=0.05 --stall_s=2")
    experiment.retriever.attempt_s = 0.5
    servers, kills = [], threading.Event()

    class Killed(SpawnedServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

    def kill():
        while not (tmp_path / "metrics.jsonl").exists() or '"main"' not in (tmp_path / "metrics.jsonl").read_text():
            time.sleep(0.01)
        os.kill(servers[0]._process.pid, signal.SIGKILL)
        kills.set()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "SpawnedServer", Killed)
        found = train(experiment, tmp_path)
    assert kills.is_set() and not servers[0].alive
    assert found["weights_sha256"] == wanted["weights_sha256"] and found["final"] == wanted["final"]
    assert without_times(rows_of(tmp_path)) == without_times(rows_of(directory))
    main = [row for row in rows_of(tmp_path) if row["stage"] == "main"]
    assert sum(row["rollout/retriever/failed_attempts"] for row in main) > 0
    assert sum(row["rollout/retriever/failures"] for row in main) == 0
    assert all(row["status/search_failed"] == 0 for row in main if "status/search_failed" in row)
    assert "serving world:multihop" in (tmp_path / "retrieval_server.log").read_text()


def test_searches_that_fail_in_the_end_are_marked_counted_and_left_out(tmp_path):
    """A deadline that most searches miss: the training goes on, and says how many episodes it left out."""
    experiment = spawned("--error_rate=0.9")
    experiment.retriever.deadline_s, experiment.log_episodes = 0.2, 64
    train(experiment, tmp_path)
    main = [row for row in rows_of(tmp_path) if row["stage"] == "main"]
    assert sum(row["rollout/retriever/failures"] for row in main) > 0
    assert sum(row["left_out"] for row in main) > 0
    assert any(row.get("status/search_failed", 0) > 0 for row in main)
    episodes = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    failed = [e for e in episodes if e["status"] == "search_failed"]
    assert failed and all(any(search["error"] for search in e["searches"]) for e in failed)


def test_a_dry_run_asks_the_server(tmp_path):
    experiment = tiny()
    experiment.retriever.url, experiment.retriever.ready_s = "http://127.0.0.1:1", 0.2
    with pytest.raises(ValueError, match=r"is not ready after 0.2 s"):
        dry_run(experiment, tmp_path)
    assert Path(tmp_path).is_dir()
