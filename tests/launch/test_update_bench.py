"""The comparison of packed and padded rows runs, and both ways are the same step."""

import json
import subprocess
import sys
from pathlib import Path


def test_both_ways_learn_the_same(tmp_path: Path):
    out = tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "launch.update_bench", "--rounds=1", "--questions=2", "--group_size=3", "--turns=2",
        "--prompt_tokens=24", "--answer_tokens=8", "--document_tokens=6", "--micro_tokens=80", "--layers=1",
        "--embed_dim=64", "--vocabulary=64", f"--out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["useful_tokens"] == 2 * 3 * (24 + 8 + 6)
    assert figures["columns"] == {"packed": 2 * 72, "padded": 3 * 2 * 38}
    assert figures["fill"] == {"packed": (23 + 3 * 15) / 72, "padded": 1.0}
    assert figures["gradient_difference"] < 2e-6
    assert len(done.stdout.splitlines()) == 6  # what was measured where, the names, both ways, ratio, gradients
