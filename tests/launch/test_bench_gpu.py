"""The one command on an accelerator, gone through on a CPU at toy sizes: every part is told, whatever becomes of it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch import bench_gpu
from launch.bench_gpu import Task
from tests.conftest import REPOSITORY

HANGS = """
import json, pathlib, sys, time
options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
if "--without" not in options:
    pathlib.Path(options["--out"]).write_text(json.dumps({"rows": [], "trying": "mosaic_gpu"}))
    time.sleep(100)
pathlib.Path(options["--out"]).write_text(json.dumps({"rows": []}))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of this test's own that a part can run."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")

    def make(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return make


def flags(out, **more):
    return SimpleNamespace(out=str(out), budget_s=120.0, only=[], small=True, **more)


def test_parts_that_fail_or_hang_or_have_no_time_are_told_and_the_others_run(module, tmp_path, monkeypatch, capsys):
    fails = module("fails", "raise SystemExit('no such device')")
    hangs = module("hangs", HANGS)
    tasks = [
        Task("hanging", (hangs,), 1),
        Task("failing", (fails,), 1),
        Task("advantage and uncertainty", ("kernels.bench", "--quick", "--repeats=1", "--only=advantage"), 8),
    ]
    monkeypatch.setattr(bench_gpu, "tasks", lambda small: tasks)
    monkeypatch.setattr(bench_gpu, "FIRST_TRY", 0.3)
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "h200.md"
    bench_gpu.main(flags(out))
    text = out.read_text()
    assert text.startswith("Not yet run on an H200; run on cpu")
    assert "| advantage | demo: B=64 T=1024 | associative |" in text
    assert "failed: no such device" in text
    assert "done (mosaic_gpu did not come back, and was left out)" in text
    monkeypatch.setattr(bench_gpu, "LEAST_S", 1e9)
    bench_gpu.main(flags(out))
    assert out.read_text().count("| no time |") == 3


def test_a_model_at_toy_sizes(tmp_path):
    out = tmp_path / "h200.md"
    command = [sys.executable, "-m", "launch.bench_gpu", "--small", "--only=3b", f"--out={out}", "--budget_s=400"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=450)
    assert done.returncode == 0, done.stderr
    assert "3b: done" in done.stdout
    text = out.read_text()
    assert "| 3b: update, tokens/s >= 18,000 |" in text
    assert "| 3b: sampler against learner, mean nats <= 0.002 |" in text and "| yes |" in text


def test_the_parts_are_all_of_the_issue_s():
    names = [task.name for task in bench_gpu.tasks(small=False)]
    assert names == ["log_prob", "decode_attention", "advantage and uncertainty", "0.5b", "3b", "7b"]
    assert not any("quick" in argument for task in bench_gpu.tasks(small=False) for argument in task.arguments)


def test_an_unknown_part_is_one_line():
    command = [sys.executable, "-m", "launch.bench_gpu", "--only=70b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 2
    assert "--only has 70b: there are log_prob, decode_attention" in done.stderr


def test_the_committed_page_says_on_what_it_ran():
    first = (REPOSITORY / "docs" / "results" / "h200.md").read_text().splitlines()[0]
    assert first.startswith(("Not yet run on an H200", "Run on"))
