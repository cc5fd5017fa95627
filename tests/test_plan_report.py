import json

import pytest

from rlrag.devices import Device, Figure
from rlrag.plan import Load
from rlrag.plan_report import COLUMNS, Case, as_json, describe, table
from tests.test_plan import ASSUMED, DEVICE, made_up, plan, setting  # noqa: F401 - a fixture

LOAD = Load(16, 8, 16)


@pytest.fixture
def made(setting):  # noqa: F811
    return plan(setting, made_up())


def test_a_plan_in_words(made):
    text = describe(made_up(), "made-up", DEVICE, made, LOAD, ASSUMED)
    assert text.startswith("16 x made-up (data 4 x model 4); parameters: policy 1")
    for part in (
        "peak, in accumulate",
        "3.44  of 10.00 usable",
        "update.micro_rows that fits 16 (configured 4)",
        "rollout.num_slots 24 (8)",
        "whole on every device of an axis: heads 3",
        "all-reduce over data",
        "all-gather over model",
        "assumed: 16 episodes",
    ):
        assert part in text, part


def test_what_does_not_fit_is_said(setting):  # noqa: F811
    found = made_up(slots=80)
    text = describe(found, "made-up", DEVICE, plan(setting, found), LOAD, ASSUMED)
    assert "TOO MUCH" in text
    assert "micro_rows that fits 0 " in text


def test_a_device_whose_speed_is_not_known(made):
    still = made.__class__(**{**vars(made), "timings": {}})
    text = describe(made_up(), "cpu", Device(Figure(2**30, "")), still, LOAD, ASSUMED)
    assert text.endswith("how fast cpu is, is not in the table: no time is predicted")


def test_the_table_and_its_figures_agree(made):
    cases = [Case("toy", "made-up", made_up(), made)]
    text = table(cases, {"made-up": DEVICE}, LOAD, ASSUMED, 12.0)
    (row,) = (line for line in text.splitlines() if line.startswith("| toy"))
    cells = dict(zip(COLUMNS, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    assert (cells["mesh"], cells["optimizer"], cells["left"], cells["micro_rows"]) == ("4 x 4", "2.00", "3.44", "16")
    data = json.loads(json.dumps(as_json(cases, LOAD, ASSUMED)))
    (case,) = data["cases"]
    assert case["peak_bytes"] == made.peak
    assert case["programs"]["accumulate"]["sent_bytes"]["all-reduce data"] == 15.0
    assert float(cells["step s"].replace(",", "")) == pytest.approx(case["step_s"], abs=0.5)
