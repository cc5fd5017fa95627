"""The command: what it refuses; and one real study of seconds, whose cell is played again to the same weights."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

FILE = """
from rlrag.study import Arm, Primary, Study
from tests.experiments import tiny

def get_config(variant):
    experiment = tiny()
    experiment.steps = 0 if variant == "warm_start" else 2
    return experiment

def get_study():
    arms = {"warm_start_continued": Arm("main", tuple(range(SEEDS))), "main": Arm("main", tuple(range(5)))}
    return Study("toy", "A toy", arms, Primary("em", "main", "warm_start_continued"))
"""


def study(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "launch.study", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(FILE.replace("SEEDS", "5"))
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config=configs/none.py"], "--config=configs/none.py: no such file; give a study"),
        (["--config=configs/search_grpo.py"], "it has no get_study(), see docs/guides/studies.md"),
        (["--config=FILE"], "is in no git repository: commit it first"),
        (["--config=FILE", "--allow_dirty", "--only=main:9"], "--only=main:9: give ARM:SEED, such as"),
        (["--config=FILE", "--allow_dirty", "--arms=x"], "--arms=x: the arms are warm_start_continued, main"),
    ],
)
def test_what_is_refused(file, arguments, told):
    status, _, error = study(*(argument.replace("FILE", str(file)) for argument in arguments))
    assert status in (1, 2)
    assert told in error
    assert error.count("\n") == 1


def test_too_few_seeds_are_refused(file):
    file.write_text(FILE.replace("SEEDS", "3"))
    status, _, error = study(f"--config={file}", "--allow_dirty")
    assert (status, "has 3 seeds: give at least 5" in error) == (1, True)


def test_a_cell_and_the_same_cell_again(file, tmp_path):
    """Whole trainings, in processes of their own, as the command plays them."""
    common = [f"--config={file}", "--allow_dirty", f"--runs={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    status, out, error = study(*common, "--only=main:3")
    assert (status, "nothing on record to compare with" in out) == (0, True), error
    again = tmp_path / "runs" / "again" / "toy-main-3"
    shutil.copytree(again, tmp_path / "runs" / "studies" / "toy" / "main-3")
    status, out, error = study(*common, "--only=main:3")
    assert (status, "is equal to the record" in out) == (0, True), error
    record = tmp_path / "runs" / "studies" / "toy" / "main-3" / "result.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_sha256": "0"}))
    status, out, _ = study(*common, "--only=main:3")
    assert (status, "is DIFFERENT from the record" in out) == (1, True)
