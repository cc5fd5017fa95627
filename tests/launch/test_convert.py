import pytest

from launch import convert as module
from launch.flags import run
from tests.decoders import FIXTURES


def launch(*argv):
    run(module.main, module.define_flags, required={"from": "HF_DIR", "to": "DIR"}, argv=["convert", *argv])


def test_there_and_back(tmp_path, capsys):
    launch(f"--from={FIXTURES / 'llama3'}", f"--to={tmp_path / 'ours'}")
    launch(f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--shard_gb=0.00001", "--dtype=bfloat16")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path / 'ours'}: a model for --config.model.path", f"{tmp_path / 'back'}: a model for transformers",
    ]  # fmt: skip
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert '"dtype": "bfloat16"' in (tmp_path / "back" / "config.json").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([f"--from={FIXTURES}"], "--to must be given"),
        ([f"--from={FIXTURES}", "--to=/tmp"], "/tmp is there already"),
        ([f"--from={FIXTURES}", "--to=runs/new"], "there is no config.json in"),
        ([f"--from={FIXTURES}", "--to=runs/new", "--dtype=int8"], "dtype"),
        ([f"--from={FIXTURES}", "--to=runs/new", "--adapter=one"], "is no run, which --adapter wants"),
        ([f"--from={FIXTURES}", "--to=runs/new", "--peft"], "is no run, which --peft wants"),
        ([f"--from={FIXTURES}", "--to=runs/new", "--base=runs/base"], "--base=runs/base is the model that an adapter"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit):
        launch(*argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
