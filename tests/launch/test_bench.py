"""The throughput command runs, and its figures mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("server", ["--noserver", "--server"])
def test_bench_prints_a_row_for_each_latency(tmp_path: Path, server: str):
    out = tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "launch.bench", "--latencies_ms=0,20", "--rounds=1", "--episodes=12", "--max_episodes=8",
        "--num_slots=4", "--turns=2", "--turn_tokens=6", "--document_tokens=4", "--prompt_tokens=8", "--layers=1",
        "--embed_dim=64", "--vocabulary=64", f"--out={out}", server,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["latency_ms"] for row in rows] == [0, 20]
    assert rows[0]["ratio"] == 1
    assert rows[1]["search_wait_s"] >= 0.02
    assert 0 < rows[0]["lane_occupancy"] <= 1
    assert 0 <= rows[0]["burst_waste"] < 1
    assert len(done.stdout.splitlines()) == 4  # what was measured where, the names, a row each
