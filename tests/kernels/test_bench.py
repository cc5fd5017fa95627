"""The benchmark prints every implementation of every operation, under a header that says where and when."""

import jax
import pytest

from kernels import bench
from kernels.advantage import api as advantage_api
from kernels.log_prob import api as log_prob_api
from kernels.uncertainty import api as uncertainty_api


def test_quick_prints_every_implementation(capsys):
    bench.main(["--quick", "--repeats", "1"])
    header, table = capsys.readouterr().out.split("\n\n")
    for line in (jax.devices()[0].device_kind, f"jax {jax.__version__}", "date ", "command  python -m kernels.bench"):
        assert line in header
    lines = table.splitlines()[1:]
    for operation, api in (
        ("log_prob fwd+bwd", log_prob_api),
        ("uncertainty", uncertainty_api),
        ("advantage", advantage_api),
    ):
        for name, entry in api.IMPLEMENTATIONS.items():
            if "cpu" not in entry.platforms:
                continue
            assert any(line.startswith(operation) and f" {name} " in line for line in lines), (operation, name)


def test_an_unknown_option_is_one_clear_line(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
