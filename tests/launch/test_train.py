import json
import signal
import subprocess
import sys

import pytest

from launch.flags import run
from launch.train import define_flags, main
from tests.conftest import REPOSITORY, STRICT

CONFIG = "from tests.experiments import tiny\n\n\ndef get_config():\n    return tiny()\n"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path / 'config.py'}"


def start(*arguments, **options):
    command = [sys.executable, *STRICT, "-m", "launch.train", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_run_as_a_user_starts_it_and_starts_it_again(config, tmp_path):
    directory = tmp_path / "runs" / "one"
    arguments = (config, f"--workdir={directory}", "--config.seed=3", "--config.steps=2")
    first = start(*arguments)
    shown, errors = first.communicate(timeout=300)
    assert (first.returncode, errors) == (0, ""), "libraries, warnings and backends say nothing"
    lines = shown.splitlines()
    beginnings = [
        "tiny: 4,656 parameters",
        "warm_up 1/4  nll ",
        "warm_up 4/4  nll ",
        "warm start on 8 test questions: EM ",
    ]
    beginnings += ["main 1/2  reward ", "main 2/2  reward ", "final on 8 test questions: EM "]
    assert [line[: len(start)] for line, start in zip(lines, beginnings)] == beginnings
    assert len(lines) == len(beginnings) + 2
    for number in ("reward ", "EM ", "held-out EM ", "tokens/s ", "searches "):
        assert number in lines[5]
    assert "oracle 1.000, random 0." in lines[6]
    result = json.loads((directory / "result.json").read_text())
    assert result["config"]["seed"] == 3
    again = start(*arguments)
    shown, errors = again.communicate(timeout=300)
    assert (again.returncode, errors) == (0, "")
    assert shown.splitlines()[0] == f"{directory} holds this run, finished: choose another --workdir to train again"
    assert shown.splitlines()[1:] == [lines[3], lines[6]]


def test_ctrl_c_is_one_line(config, tmp_path):
    process = start(config, f"--workdir={tmp_path / 'x'}", "--config.warm_up.steps=100000", start_new_session=True)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("warm_up 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "error: interrupted: the same command goes on from the last checkpoint\n"


def test_sigterm_saves_at_the_end_of_the_step(config, tmp_path):
    """A scheduler's request: exit status 0, and the same command goes on from that step."""
    arguments = (
        config,
        f"--workdir={tmp_path / 'x'}",
        "--config.warm_up.steps=100000",
        "--config.checkpoint_every=99999",
    )
    process = start(*arguments)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("warm_up 1/"):
            break
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert f"asked to end: saved in {tmp_path / 'x'}, the same command goes on from here" in shown
    (saved,) = (path.name for path in (tmp_path / "x" / "checkpoints").iterdir())
    assert len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()) == int(saved)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config.model.num_kv_heads=3"],
            "model.num_heads is 2, not a multiple of num_kv_heads 3: change one of them",
        ),
        (
            ["--config.rollout.train.top_k=20"],
            "rollout.train has top_k 20, but rollout.num_kept, the room for filtered sets, is 0: give "
            "--config.rollout.num_kept=20 or more",
        ),
        (
            ["--config.main.update.row_tokens=64"],
            "main.update.row_tokens is 64, but episodes have up to 93 tokens (the agent's max_tokens): give "
            "--config.main.update.row_tokens=93 or more",
        ),
        (
            ["--config.rollout.num_pages=5"],
            "rollout.num_pages is 5 over 1 shard(s), one stream of max_tokens 96 needs 12 pages on its "
            "shard: raise num_pages",
        ),
        (["--config.mesh.data=3"], "mesh data=3 x model=1 does not cover 1 device(s): choose sizes whose product is 1"),
        (
            ["--config.main.update.schedule=cosin"],
            "main.update.schedule is 'cosin': choose 'constant' or 'cosine' or 'linear'",
        ),
        (
            ["--config.data.test=world:multihop?sed=1"],
            "'world:multihop?sed=1' has the option 'sed'; there are: split, seed,",
        ),
        (["--config.data.train=nope.jsonl"], "data.train is 'nope.jsonl', data.validation is 'world:"),
        (
            ["--config.recipe=nope"],
            "recipe is 'nope': name module:function",
        ),
        (
            ["--workdir=/proc/nope/x"],
            "the workdir /proc/nope/x cannot be written (No such file or directory): choose another",
        ),
    ],
)
def test_wrong_values_and_shapes_are_told_at_the_start(config, tmp_path, capsys, arguments, line):
    argv = ["launch.train", config, f"--workdir={tmp_path / 'x'}", *arguments]
    with pytest.raises(SystemExit) as ended:
        run(main, define_flags, argv=argv)
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith(f"error: {line}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "x" / "config.json").exists(), "the mended command may use the directory"
