"""Targets beside figures, and every figure in a table."""

import subprocess
import sys

from rlrag.speed import findings
from rlrag.speed.findings import Part
from tests.conftest import REPOSITORY

KERNEL = {
    "operation": "log_prob fwd+bwd", "implementation": "mosaic_gpu", "shape": "3b: N=4096", "error": "",
    "median_s": 0.01, "min_s": 0.01, "rate": 6e14, "bound": "matrix", "ceiling": 6.6e14, "temporary_bytes": 2**28,
    "peak_bytes": 0, "check": 1e-3, "time_ratio": 0.5, "memory_ratio": 0.05, "compile_s": 1.0, "share": 0.909,
}  # fmt: skip
FIGURES = {"device": "1 x NVIDIA H200, 16 cores", "date": "2026-12-01T10:00+00:00", "jax": "0.11.2"}


def row(**changes):
    return KERNEL | changes


def model(**runs):
    return [{"run": name.replace("_", " ")} | values for name, values in runs.items()]


def met(parts):
    return {name: yes for name, _, yes in findings.targets(parts)}


def test_the_fastest_right_implementation_is_held_against_the_targets():
    rows = [
        row(),
        row(implementation="chunked", median_s=0.02, share=0.45, memory_ratio=0.2),
        row(implementation="quick and wrong", median_s=0.001, error="wrong numbers"),
        row(implementation="naive", median_s=0.002, memory_ratio=1.0),
    ]
    found = met([Part("log_prob", "", figures={"rows": rows})])
    assert list(found.values()) == ["yes", "yes"]
    assert all("mosaic_gpu" in name for name in found)
    found = met([Part("log_prob", "", figures={"rows": rows[1:]})])
    assert list(found.values()) == ["no", "no"]
    assert list(met([Part("log_prob", "", figures={"rows": rows[2:]})]).values()) == ["no"]


def test_models_are_held_against_theirs():
    rows = model(
        decode={"share_of_floor": 0.71},
        search_0_ms={"ratio": 1.0},
        search_200_ms={"ratio": 0.9},
        update={"share_of_matrix": 0.41, "tokens_per_s": 7000.0, "learns": "gradients"},
        step={"error": "out of memory"},
    )
    assert list(met([Part("7b", "", figures={"rows": rows})]).values()) == ["yes", "yes", "no", "no", "-"]
    assert len(met([Part("0.5b", "", figures={"rows": rows})])) == 4


def test_the_page_begins_with_what_it_ran_on():
    part = Part("log_prob", "python -m kernels.bench", 12.0, "done", FIGURES | {"rows": [row()]})
    text = findings.page([part, Part("7b", "python -m launch.bench")], "make bench-gpu", 100, 470)
    first = "Run on 1 x NVIDIA H200, 16 cores, 2026-12-01T10:00+00:00, JAX 0.11.2: `make bench-gpu`, 100 of 470 s."
    assert text.splitlines()[0] == first
    assert "| 7b | 0 | no time | `python -m launch.bench` |" in text
    assert "| 600 TFLOP/s | 0.909 |" in text
    other = findings.page([Part("log_prob", "", figures={"device": "1 x NVIDIA H100"})], "c", 1, 2)
    assert other.startswith("Not yet run on an H200; run on 1 x NVIDIA H100")


def test_what_failed_and_what_was_left_out_stands_in_the_table():
    rows = [row(median_s=None, error="XlaRuntimeError: a | b", memory_ratio=None, temporary_bytes=None)]
    part = Part("log_prob", "", figures={"rows": rows, "left_out": ["log_prob fwd at 7b"]})
    text = findings.page([part], "c", 1, 2)
    assert "XlaRuntimeError: a \\| b" in text
    assert "Left out, no time: log_prob fwd at 7b." in text


def test_no_jax_is_loaded():
    program = "import sys, rlrag.speed.findings, launch.bench_gpu; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
