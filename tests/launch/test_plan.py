import os
import subprocess
import sys

import pytest

from launch import flags, plan
from tests.conftest import REPOSITORY, STRICT

CONFIG = """from tests.experiments import tiny


def get_config():
    found = tiny()
    found.model.dtype = found.model.param_dtype = "bfloat16"
    return found
"""


def run(folder, *arguments: str) -> tuple[int, str, str]:
    (folder / "config.py").write_text(CONFIG)
    command = [sys.executable, *STRICT, "-m", "launch.plan", f"--config={folder / 'config.py'}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_plan_of_devices_that_are_not_here(tmp_path):
    status, shown, errors = run(tmp_path, "--mesh=data:2,model:2,replica:2", "--device=h200,tpu-v5p")
    assert (status, errors) == (0, ""), "libraries, warnings and backends say nothing"
    mesh = "8 x h200 (replica 2 x data 2 x model 2); parameters: policy 4,656"
    for part in (mesh, "8 x tpu-v5p", "all-reduce over data"):
        assert part in shown, part
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert "whole" not in shown
    for program in ("prefill", "decode", "accumulate", "apply", "a"):
        assert program in rows
    assert rows["weights"][1] == "0.00"


def test_devices_that_do_not_divide_the_rows_are_told(tmp_path):
    status, shown, errors = run(tmp_path, "--mesh=data:3")
    assert (status, shown, len(errors.splitlines())) == (1, "", 1)
    assert errors.startswith("error: warm_up.update.micro_rows is 4: make it a multiple of the 3 data shard(s)")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--mesh=data:2", "--device=h300"],
            "there is no device 'h300' in the table: choose tpu-v5p, h100, h200 or cpu",
        ),
        (["--mesh=data=2"], "mesh is 'data=2': write axis:size once for each of data, model, replica"),
        (["--mesh=data:2,data:2"], "mesh is 'data:2,data:2': write axis:size once"),
        ([], "mesh.data is -1, all devices that there are: say how many with --mesh=data:8,model:1"),
        (["--mesh=data:1", "--sampled_tokens=9999"], "sampled_tokens is 9999 and observed_tokens"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, told):
    (tmp_path / "config.py").write_text(CONFIG)
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):  # which the command changes
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SystemExit) as ended:
        flags.run(plan.main, plan.define_flags, argv=["launch.plan", f"--config={tmp_path / 'config.py'}", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith(f"error: {told}")
    assert (len(captured.err.splitlines()), captured.out) == (1, "")
