"""The benchmark prints every implementation of every operation, under a header that says where and when."""

import json

import jax
import pytest

from kernels import bench
from kernels.advantage import api as advantage_api
from kernels.decode_attention import api as decode_attention_api
from kernels.dispatch import Implementation
from kernels.log_prob import api as log_prob_api
from kernels.uncertainty import api as uncertainty_api


def test_quick_prints_every_implementation(capsys, tmp_path):
    out = tmp_path / "figures.json"
    bench.main(["--quick", "--repeats=1", f"--out={out}"])
    header, table = capsys.readouterr().out.split("\n\n")
    for line in (jax.devices()[0].device_kind, f"jax {jax.__version__}", "date ", "command  python -m kernels.bench"):
        assert line in header
    lines = table.splitlines()[1:]
    for operation, api in (
        ("log_prob fwd+bwd", log_prob_api),
        ("uncertainty", uncertainty_api),
        ("advantage", advantage_api),
        ("decode_attention", decode_attention_api),
    ):
        for name, entry in api.IMPLEMENTATIONS.items():
            if "cpu" in entry.platforms:
                assert any(line.startswith(operation) and f" {name} " in line for line in lines), (operation, name)
    assert "FAILED" not in table
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == len(lines)
    assert figures["rows"][0]["check"] is None or figures["rows"][0]["check"] < 1e-3
    assert figures["left_out"] == []


def broken(*arguments, **options):
    raise NotImplementedError("not on this device")


def test_one_that_does_not_build_is_told_and_one_can_be_left_out(capsys, monkeypatch):
    monkeypatch.setitem(advantage_api.IMPLEMENTATIONS, "broken", Implementation(broken))
    bench.main(["--quick", "--repeats=1", "--only=advantage", "--without=associative"])
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["reference", "broken"] * 2, "without and with groups"
    assert lines[1].endswith("FAILED: NotImplementedError: not on this device")


def test_what_there_is_no_time_for_is_named(capsys):
    bench.main(["--quick", "--repeats=1", "--only=advantage,uncertainty", "--budget_s=-1"])
    assert capsys.readouterr().out.count("left out, no time: ") == 4


@pytest.mark.parametrize(
    ("option", "told"),
    [("--fast", "unrecognized arguments: --fast"), ("--only=speed", "'speed' is none of log_prob, uncertainty")],
)
def test_a_wrong_option_is_one_clear_line(capsys, option, told):
    with pytest.raises(SystemExit):
        bench.main([option])
    assert told in capsys.readouterr().err


def test_tuning_says_what_it_did(capsys):
    bench.main(["--tune", "--only=advantage"])
    assert capsys.readouterr().out.startswith("nothing to tune")
