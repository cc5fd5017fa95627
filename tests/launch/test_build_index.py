import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.build_index import Told
from tests.shared_data import FIXTURES

ROOT = Path(__file__).resolve().parents[2]
TITLED = str(FIXTURES / "corpus_titled.jsonl")


def build(*arguments):
    command = [sys.executable, "-m", "launch.build_index", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_index_from_the_command_line(tmp_path):
    out = tmp_path / "index"
    done = build(f"--corpus={TITLED}", "--kind=flat", "--encoder=tests.retrieval.encoders:hashing", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "encoded 5 of 5 passages" in done.stdout and f"{out}: flat, 5 passages" in done.stdout
    assert json.loads((out / "manifest.json").read_text())["count"] == 5
    again = build(f"--corpus={TITLED}", f"--out={out}")
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and "holds a finished index" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--corpus=nowhere.jsonl", "--out=x"], 1, "corpus is 'nowhere.jsonl', which is no file"),
        ([f"--corpus={TITLED}"], 2, "--out"),
        ([f"--corpus={TITLED}", "--out=x", "--kind=lsh"], 1, "kind is 'lsh': choose bm25, flat"),
        ([f"--corpus={TITLED}", "--out=x", "--kind=flat"], 1, "kind flat needs an encoder: give --encoder=minilm"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, status, message):
    done = build(*arguments)
    assert done.returncode == status and message in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "x").exists()


def test_progress_is_told_now_and_then(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    told = Told(said.append)
    for done in range(0, 101, 10):
        told("read", done, 100)
        now[0] += 1.0
    told("encoded", 5, 0)
    assert said == ["read 50 of 100 passages, 10 a second", "read 100 of 100 passages, 10 a second"]
