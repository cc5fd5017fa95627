"""Both sides of a comparison do the same work."""

import pytest

from kernels import ceilings
from rlrag.speed import comparisons, fixed_batch
from tests.speed.tiny import SETTING


@pytest.fixture(scope="module")
def probes():
    return ceilings.open_ceilings("float32", ceilings.QUICK)


def test_the_engine_and_the_fixed_batch_sample_as_much(probes, monkeypatch):
    monkeypatch.setattr(fixed_batch, "BUCKET", 1280)  # one program in place of several
    monkeypatch.setattr(fixed_batch, "CHUNK", 128)
    plain, engine = comparisons.fixed_batches(SETTING, probes, 1)
    assert (plain["run"], engine["run"]) == ("fixed batch", "engine")
    assert plain["sampled_tokens"] == engine["sampled_tokens"]
    assert plain["ratio"] == 1
    assert engine["ratio"] == pytest.approx(engine["tokens_per_s"] / plain["tokens_per_s"])
    assert plain["slot_occupancy"] < engine["slot_occupancy"]


def test_groups_read_their_prompt_once(probes):
    alone, shared = comparisons.sharing(SETTING, probes, 1)
    assert alone["shared_tokens"] == 0
    # 511 tokens are read of each prompt; the 127 whole pages of 4 are shared.
    assert (alone["prefill_tokens"], shared["prefill_tokens"]) == (8 * 511, 8 * 511 - 7 * 508)
    assert shared["prefill_flops_fewer"] > 6
    assert alone["sampled_tokens"] == shared["sampled_tokens"]


def test_packed_and_padded_rows_learn_the_same_from_as_many_tokens(probes):
    rows = {row["run"]: row for row in comparisons.padding(SETTING, probes, 1)}
    padded, kernels, packed = (rows[name] for name in ("padded", "padded, our kernels", "packed"))
    # Eight answers of 64 + 128 + 64 tokens to a prompt of 512; rows of 768 fill micro-batches of 4 best.
    assert padded["columns"] == kernels["columns"] == 8 * 768
    assert packed["columns"] == 2688
    assert [row["row_tokens"] for row in (padded, packed)] == [8 * 768, 511 + 8 * 257]
    for row in rows.values():
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(8 * 768)
        assert row["gradient_apart"] < 2e-6
        assert row["programs"] == 1
    assert padded["ratio"] == kernels["ratio_to_our_padded"] == 1
    assert packed["ratio"] == pytest.approx(padded["seconds"] / packed["seconds"])
