import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.flags import run
from launch.prepare_data import define_flags, main, prepare
from rlrag.data.sources import TfdsSource, load_examples
from rlrag.trajectory import Example
from tests.shared_data import FIXTURES, present

ROOT = Path(__file__).parents[2]
FILES = [
    *(FIXTURES / name for name in ("hotpotqa.json", "2wikimultihopqa.json", "musique.jsonl", "ircot.jsonl")),
    *(FIXTURES / name for name in ("bamboogle.jsonl", "nq_open.jsonl", "pooled.jsonl", "plain.jsonl")),
    *present("multihop/musique_ans_v1.0_dev.sample.jsonl.gz", "corpus/questions.jsonl.gz"),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_examples_come_back_equal_and_in_order(tmp_path, path):
    directory = prepare({"train": path}, "questions", tmp_path)
    assert directory == tmp_path / "questions" / "1.0.0"
    examples = load_examples(path)
    assert list(TfdsSource("questions", data_dir=tmp_path)) == examples
    assert list(TfdsSource(directory)) == examples
    assert [item.name for item in tmp_path.iterdir()] == ["questions"]  # nothing temporary is left


def test_splits(tmp_path):
    prepare({"train": FIXTURES / "plain.jsonl", "validation": FIXTURES / "nq_open.jsonl"}, "questions", tmp_path)
    assert [e.id for e in TfdsSource("questions", "train", data_dir=tmp_path)] == ["plain-0", "7"]
    assert [e.id for e in TfdsSource("questions", "validation[1:]", data_dir=tmp_path)] == ["nq_open-1"]


def test_running_it_again(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "q?", "answers": ["a"]}\n')
    out = tmp_path / "out"
    directory = prepare({"train": data}, "questions", out)
    before = {item.name: item.stat().st_mtime_ns for item in directory.iterdir()}
    assert prepare({"train": data}, "questions", out) == directory
    assert {item.name: item.stat().st_mtime_ns for item in directory.iterdir()} == before  # left as it was
    data.write_text('{"question": "new?", "answers": ["a"]}\n')
    with pytest.raises(ValueError, match="was made from other files or another format: pass --overwrite"):
        prepare({"train": data}, "questions", out)
    prepare({"train": data}, "questions", out, overwrite=True)
    assert list(TfdsSource("questions", data_dir=out)) == [Example("data-0", "new?", ("a",))]
    data.write_text("broken")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        prepare({"train": data}, "questions", out, overwrite=True)
    assert TfdsSource("questions", data_dir=out)[0].question == "new?"  # a bad file does not cost the old dataset
    assert [item.name for item in out.iterdir()] == ["questions"]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("Hotpot-QA", "train", "dataset name is 'Hotpot-QA'"), ("a", "train[:5]", r"split is 'train\[:5\]'")],
)
def test_bad_names(tmp_path, name, split, message):
    with pytest.raises(ValueError, match=message):
        prepare({split: FIXTURES / "plain.jsonl"}, name, tmp_path)


def start(*flags):
    """The program as a user starts it, with a look at what it imported."""
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('tensorflow' in sys.modules, 'jax' in sys.modules))\n"
        "runpy.run_module('launch.prepare_data', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_program(tmp_path):
    data = f"--data={FIXTURES / 'hotpotqa.json'}"
    done = start(data, "--name=hotpotqa", f"--out={tmp_path}", "--split=dev")
    assert done.returncode == 0, done.stderr
    summary, imported = done.stdout.splitlines()
    assert summary.startswith(f"{tmp_path}/hotpotqa/1.0.0: dev 2 questions; read it with TfdsSource('hotpotqa'")
    assert imported == "False False"
    assert list(TfdsSource("hotpotqa", "dev", data_dir=tmp_path)) == load_examples(FIXTURES / "hotpotqa.json")


@pytest.mark.parametrize(
    ("flags", "status", "line"),
    [
        (["--data=bad.jsonl"], 1, "bad.jsonl, line 2: field 'answers' is missing; give it, or name another"),
        (["--data=absent.jsonl"], 1, "absent.jsonl: No such file or directory: check that path"),
        (["--data=a", "--data=b"], 2, "2 --data but 1 --split: give one --split for each --data"),
        (["--data=a", "stray"], 2, "'stray' is not a flag: every option is written --name=value"),
        (["--data=bad.jsonl", "--format=csv"], 1, "bad.jsonl, line 1: format is 'csv': give one of hotpotqa,"),
        (["--date=a"], 2, "there is no flag --date: did you mean --data?"),
        ([], 2, "--data must be given, as in --data=questions.json"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, flags, status, line):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"question": "q?", "answers": ["a"]}) + '\n{"question": "q?"}\n')
    flags = [flag.replace("=bad", f"={tmp_path}/bad") for flag in flags]
    required = {"data": "questions.json", "name": "hotpotqa", "out": "datasets"}
    argv = ["launch.prepare_data", *flags, "--name=questions", f"--out={tmp_path}/out"]
    with pytest.raises(SystemExit) as ended:
        run(main, define_flags, required=required, argv=argv)
    assert ended.value.code == status
    shown = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert shown.startswith(f"error: {line}")
    assert shown.count("\n") == 1
    assert not (tmp_path / "out" / "questions").exists()
