"""Studies of stub trainings: a Python process that writes what launch.train writes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from rlrag.config import Experiment
from rlrag.study import CONTINUED, Arm, Cell, Primary, Runner, Study, cells_of, committed, lock, read_rows

SEEDS = (0, 1, 2, 3, 4)
STUDY = Study(
    "toy", "A toy", {CONTINUED: Arm(CONTINUED, SEEDS), "new": Arm("new", SEEDS, {"steps": 7})},
    Primary("em", "new", CONTINUED),
)  # fmt: skip

# A training of `seconds` that counts how often it was started, and ends as it is told.
TRAINING = """
import json, pathlib, sys, time
directory, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
with (directory / "starts").open("a") as file: file.write("x")
time.sleep(seconds)
if status: sys.exit(status)
(directory / "result.json").write_text(json.dumps({"final": {"em": 0.5, "f1": 0.6}, "seconds": seconds}))
"""


def stub(directory, name, *, after=None, seconds=0.0, status=0):
    command = (sys.executable, "-S", "-c", TRAINING, str(directory / name), str(seconds), str(status))
    return Cell(name, directory / name, command, after)


def starts(cell):
    path = cell.directory / "starts"
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": {"new": Arm("new", SEEDS)}}, "has no arm 'warm_start_continued'"),
        (
            {"primary": Primary("em", "old", CONTINUED)},
            "a contrast names 'old'; the arms are: warm_start_con",
        ),
        ({"contrasts": (("new", "x"),)}, "a contrast names 'x'"),
        ({"primary": Primary("acc", "new", CONTINUED)}, "the primary metric 'acc' is none of em, f1, searches"),
        ({"arms": STUDY.arms | {"new": Arm("new", (0, 1))}}, "arm 'new' of the primary contrast has 2 seeds: give at"),
    ],
)
def test_a_study_that_could_not_say_what_it_asks_is_told(change, told):
    STUDY.check()
    with pytest.raises(ValueError, match=told):
        replace(STUDY, **change).check()


def test_cells_share_the_warm_start_of_their_seed(tmp_path):
    cells = cells_of(STUDY, "configs/toy.py", lambda variant: Experiment(name=variant), tmp_path)
    assert set(cells) == {(arm, seed) for arm in (CONTINUED, "new") for seed in SEEDS}
    new = cells["new", 3]
    assert new.after == cells[CONTINUED, 3].after
    assert new.command[1:] == (
        "-m", "launch.train", "--config=configs/toy.py:new", "--config.seed=3", f"--workdir={new.directory}",
        f"--config.warm_start={new.after.directory}", "--config.steps=7",
    )  # fmt: skip
    assert len({cell.after.directory for cell in cells.values()}) == len(SEEDS)


def test_studies_share_warm_starts_of_equal_configurations(tmp_path):
    def directory(study, **fields):
        config = lambda variant: Experiment(**{"name": study.name} | fields)  # noqa: E731
        return cells_of(study, "f.py", config, tmp_path)["new", 0].after.directory

    assert directory(STUDY) == directory(replace(STUDY, name="other"))
    assert directory(STUDY) != directory(STUDY, recipe="x:y")


def test_cells_are_played_once_behind_their_warm_start(tmp_path):
    start = stub(tmp_path, "start", seconds=0.2)
    cells = [stub(tmp_path, f"cell{n}", after=start) for n in range(3)]
    assert Runner(cells, 2).run() == []
    assert [starts(cell) for cell in (start, *cells)] == [1, 1, 1, 1]
    assert Runner(cells, 2).run() == []
    assert [starts(cell) for cell in (start, *cells)] == [1, 1, 1, 1], "what is finished is not played again"


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, capsys):
    good, bad = stub(tmp_path, "start"), stub(tmp_path, "bad", status=3)
    cells = [stub(tmp_path, "behind", after=bad), stub(tmp_path, "fine", after=good)]
    assert [cell.name for cell in Runner(cells, 1).run()] == ["bad", "behind"]
    assert [starts(cell) for cell in cells] == [0, 1]
    shown = capsys.readouterr().out
    assert "FAILED  bad (exit status 3)" in shown
    assert "log.txt" in shown
    assert "fine: EM 0.500" in shown


def test_a_lock_holds_off_others_and_ends_with_its_process(tmp_path):
    source = (
        f"from rlrag.study import lock\nimport pathlib, time\nwith lock(pathlib.Path({str(tmp_path)!r})) as held:\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", source + " print(held, flush=True)\n time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with lock(tmp_path) as held:
        assert not held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with lock(tmp_path) as held:
        assert held


def test_what_another_invocation_plays_is_waited_for(tmp_path):
    cell = stub(tmp_path, "cell", seconds=0.5)
    (tmp_path / "cell").mkdir()
    source = (
        f"from rlrag.study import Runner, Cell\nfrom pathlib import Path\n"
        f"Runner([Cell('cell', Path({str(cell.directory)!r}), {cell.command!r})], 1).run()"
    )
    other = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.DEVNULL)
    while starts(cell) == 0:
        time.sleep(0.01)
    assert Runner([cell], 1).run() == []
    other.wait()
    assert starts(cell) == 1


def test_an_interrupt_ends_the_children(tmp_path, monkeypatch):
    cell = stub(tmp_path, "cell", seconds=60)
    runner = Runner([cell], 1)

    def interrupt(self):
        if starts(cell):
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_tell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert runner.running[0].process.returncode == -signal.SIGTERM


def test_half_a_line_is_not_read(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_rows(tmp_path / "rows") == [{"a": 1}, {"a": 2}]
    assert read_rows(tmp_path / "none") == []


def git(directory, *arguments):
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True, env=os.environ | identity)


def test_what_is_asked_must_be_committed(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text("1")
    with pytest.raises(ValueError, match=r"toy.py is in no git repository: commit it first, .* or give --allow_dirty"):
        committed(file)
    git(tmp_path, "init")
    with pytest.raises(ValueError, match=r"toy.py (is in no git repository|differs from its last commit)"):
        committed(file)
    git(tmp_path, "add", "toy.py")
    git(tmp_path, "commit", "-m", "ask")
    assert len(committed(file)) == 40
    file.write_text("2")
    with pytest.raises(ValueError, match=r"toy.py differs from its last commit: commit it first"):
        committed(file)


def test_the_record_of_a_result_is_json(tmp_path):
    cell = stub(tmp_path, "cell")
    assert cell.result is None
    Runner([cell], 1).run()
    assert cell.result == json.loads((cell.directory / "result.json").read_text())
