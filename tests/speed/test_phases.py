"""Rows of each phase, as far as they do not depend on a clock. As a program: tests/launch/test_bench.py."""

import pytest

from kernels import ceilings
from rlrag.speed import phases
from rlrag.speed.searching import searchers
from tests.speed.tiny import SETTING, Rates


@pytest.fixture(scope="module")
def probes():
    own = ceilings.open_ceilings("float32", ceilings.QUICK)
    own.sample()
    return own


def test_a_rollout_has_a_row_of_decoding_and_one_for_each_latency(probes):
    with searchers([0.0, 0.02], server=False) as searcher_of:
        decode, none, slow = phases.rollout(SETTING, probes, [0.0, 0.02], searcher_of, 1)
    assert [row["run"] for row in (decode, none, slow)] == ["decode", "search 0 ms", "search 20 ms"]
    assert 0 < decode["slot_occupancy"] <= 1
    assert decode["sampled_tokens"] == 4 * 7
    assert none["ratio"] == 1
    assert slow["search_wait_s"] >= 0.02
    assert none["sampled_tokens"] == slow["sampled_tokens"]
    assert {row["programs"] for row in (decode, none, slow)} == {1}
    assert decode["compile_s"] > 0 and decode["peak_bytes"] > 0


def test_a_step_ends_where_the_sampler_was(probes):
    (row,) = phases.step(SETTING, probes, 1)
    assert 0 <= row["gap_mean"] <= row["gap_max"] < 1e-5
    assert row["programs"] == 1
    assert row["seconds"] == pytest.approx(sum(row[name] for name in ("lay_out_s", "rollout_s", "pack_s", "update_s")))
    assert row["sampled_tokens"] == 8 * 128


def test_what_is_predicted_is_what_a_run_reports(probes):
    decode, talk, update = phases.predicted(SETTING, Rates)
    with searchers([0.0], server=False) as searcher_of:
        played = next(phases.rollout(SETTING, probes, [0.0], searcher_of, 1))
    assert decode["decode_flops"] == played["decode_flops"]
    assert decode["floor_s"] == pytest.approx(decode["decode_floor_s"] + decode["prefill_floor_s"])
    assert talk["run"] == "rollout"
    assert update["run"] == "update (all)"
    assert update["apply_flops"] == 0 < update["apply_bytes"]


def test_medians_are_of_numbers():
    assert phases.medians([{"a": 1, "b": "x"}, {"a": 5, "b": "y"}, {"a": 2, "b": "z"}]) == {"a": 2, "b": "z"}
