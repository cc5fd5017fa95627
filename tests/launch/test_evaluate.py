import json

import pytest

from launch.evaluate import define_flags, main
from launch.flags import run
from rlrag.train import train
from tests.experiments import tiny
from tests.shared_data import FIXTURES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run that was killed behind its warm-up."""
    experiment = tiny()
    experiment.warm_up.steps, experiment.steps = 1, 0
    directory = tmp_path_factory.mktemp("run")
    train(experiment, directory)
    return directory


def evaluate(checkpoint, data, out):
    run(main, define_flags, argv=["launch.evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--out={out}"])


def test_scores_and_predictions(checkpoint, tmp_path, capsys):
    out = tmp_path / "below" / "predictions.jsonl"
    evaluate(checkpoint, "world:multihop?split=test&seed=7&n=12", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"multihop-test-7-{number:06d}" for number in range(12)]
    assert {"id", "question", "answers", "prediction", "em", "f1", "searches", "tokens", "hops"} <= set(rows[0])
    assert [path.name for path in out.parent.iterdir()] == ["predictions.jsonl"], "nothing temporary is left"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "oracle policy: EM 1.0000"
    assert lines[1].startswith("random policy: EM 0.")
    em = sum(row["em"] for row in rows) / 12
    assert lines[2].startswith(f"EM {em:.4f}  95 % bootstrap [")
    assert lines[3].startswith("F1 ")
    assert json.loads(lines[4])["questions"] == 12
    assert lines[5] == f"{out}: predictions"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"checkpoint": "nope"}, "--checkpoint=nope is no directory, seen from "),
        (
            {"checkpoint": FIXTURES},
            f"{FIXTURES} holds no config.json: name the --workdir of a finished or running training",
        ),
        ({"data": "nope.jsonl"}, "nope.jsonl does not exist"),
        (
            {"data": "world:multihop?splt=test"},
            "'world:multihop?splt=test' has the option 'splt'; there are: split, seed",
        ),
        (
            {"data": FIXTURES / "hotpotqa.json"},
            "{checkpoint} cannot read {fixtures}/hotpotqa.json: the word 'Who' is not",
        ),
        ({"out": FIXTURES}, "--out={fixtures} is a directory: name a file, as in --out={fixtures}/predictions.jsonl"),
        ({"out": "/proc/nope/x.jsonl"}, "/proc/nope: No such file or directory: check that path"),
    ],
)
def test_what_is_wrong_is_one_line(checkpoint, tmp_path, capsys, options, line):
    given = {"checkpoint": checkpoint, "data": "world:multihop?n=2&split=test", "out": tmp_path / "out.jsonl"} | options
    with pytest.raises(SystemExit) as ended:
        evaluate(**given)
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith("error: " + line.format(checkpoint=checkpoint, fixtures=FIXTURES))
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "no empty predictions are left"
