"""The speed commands run, with jax, flax, optax, numpy and absl alone, and their figures mean what they say."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs.scale import VARIANTS
from launch import bench
from launch.bench_gpu import SMALL
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import num_parameters
from rlrag.speed.floor import num_weights
from tests.conftest import REPOSITORY

SIZES = " ".join(SMALL).split()
# Runs a module with every import beyond the core refused.
CORE_ALONE = """
import importlib.abc, runpy, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is refused", name=name)

REFUSED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Refuses())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
CORE = {
    "absl-py",
    "flax",
    "jax",
    "numpy",
    "optax",
    "scipy",
    "rich",
    "orbax-checkpoint",
}  # the last come with the others
# Packages by the names under which they are imported, where these are others.
MODULES = {"faiss-cpu": "faiss", "orbax-checkpoint": "orbax", "tensorboardx": "tensorboardX"}


def refused() -> str:
    """All that the project depends on beyond the core."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", each.lower())[0] for each in listed} - CORE  # type: ignore[index]
    return ",".join(sorted(MODULES.get(name, name.replace("-", "_")) for name in names))


def play(*arguments: str, core_alone: bool = False) -> subprocess.CompletedProcess:
    program = ["-c", CORE_ALONE, refused(), "launch.bench"] if core_alone else ["-m", "launch.bench"]
    command = [sys.executable, *program, *SIZES, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=200)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """All phases of a published shape, cut down, in one process that has the core packages alone."""
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    arguments = ("--shape=3b", "--phase=rollout,update,step", "--search_ms=20", f"--out={out}")
    done = play(*arguments, core_alone=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_phase_has_its_rows(figures):
    found, printed = figures
    rows = {row["run"]: row for row in found["rows"]}
    assert list(rows) == ["decode", "search 0 ms", "search 20 ms", "update", "step"]
    for row in rows.values():
        assert row["tokens_per_s"] > 0
        assert row["floor_s"] > 0
        assert row["programs"] == 1
        assert row["compile_s"] > 0
        assert row["peak_bytes"] > 0
        assert row["ceiling_flops"] > 0
    assert rows["search 0 ms"]["ratio"] == 1
    assert rows["search 20 ms"]["search_wait_s"] >= 0.02
    assert rows["step"]["gap_max"] < 1e-4
    header, names, *lines = printed.splitlines()
    assert found["device"] in header and found["jax"] in header
    assert names.split() == ["decode", "search", "0", "ms", "search", "20", "ms", "update", "step"]
    assert {line.split()[0] for line in lines} == {name for row in found["rows"] for name in row} - {"run"}


def test_the_kernels_that_ran_are_named(figures):
    assert {"log_prob", "uncertainty", "packed_attention"} <= set(figures[0]["kernels"])


def test_searches_through_a_server(tmp_path: Path):
    out = tmp_path / "figures.json"
    done = play("--search_ms=20", "--server", f"--out={out}")
    assert done.returncode == 0, done.stderr
    _, none, slow = json.loads(out.read_text())["rows"]
    assert none["search_wait_s"] < slow["search_wait_s"] >= 0.02


def test_a_phase_that_fails_does_not_stop_the_others(tmp_path: Path):
    out = tmp_path / "figures.json"
    done = play("--phase=update,rollout", "--row_tokens=40", "--search_ms=0", f"--out={out}")
    assert done.returncode == 1
    update, *others = json.loads(out.read_text())["rows"]
    assert update["error"].startswith("ValueError: a stream has ")
    assert [row["run"] for row in others] == ["decode", "search 0 ms"]


def test_predictions_need_no_run_and_a_comparison_is_no_prediction(tmp_path: Path):
    out = tmp_path / "figures.json"
    done = play("--predict", "--shape=7b", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert [row["run"] for row in json.loads(out.read_text())["rows"]] == ["decode", "rollout", "update (all)"]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--search_ms=soon", "--search_ms is soon: give milliseconds"),
        ("--phase=sleep", "--phase has 'sleep': give some of rollout,update,step"),
        ("--against=fixed_batch --phase=step", "--against=fixed_batch is of --phase=rollout, not step"),
        ("--against=padded", "--against=padded is of --phase=update, not rollout"),
        ("--profile=x --predict", "--profile is of a phase"),
    ],
)
def test_mistakes_are_one_line(argument, told):
    done = play(*argument.split())
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "billions"), [("qwen2.5-0.5b", 0.494), ("3b", 3.09), ("qwen2.5-3b", 3.09), ("7b", 7.62)]
)
def test_published_shapes_have_their_published_size(shape, billions):
    a = bench.architecture(shape)
    assert isinstance(a, Architecture)
    assert num_parameters(a) == pytest.approx(billions * 1e9, rel=0.01)
    assert num_weights(a) == pytest.approx(billions * 1e9, rel=0.01)
    assert a.vocab_size in {size.vocab_size for size in VARIANTS.values()}
