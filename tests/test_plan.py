"""Arithmetic of a plan against what can be calculated by hand; nothing is compiled."""

from dataclasses import replace

import pytest

from configs.scale import VARIANTS, get_config
from rlrag.config import Mesh
from rlrag.devices import Device, Figure
from rlrag.dry_run import account
from rlrag.hlo import Cost
from rlrag.plan import Assumed, Load, forecast, largest, leaves, open_setting, runs_of
from rlrag.rollout.advance import PAGES
from rlrag.survey import Line, Survey
from tests.experiments import tiny

# As published: Qwen2.5's technical report (arXiv 2412.15115), table 1, and the sums of the checkpoints' tensors.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
}
GIB = 2**30


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_published_shapes(tmp_path, variant):
    """Two bytes a parameter, and as many of the reference; Adam's two moments and the master in float32."""
    experiment, N = get_config(variant), PARAMETERS[variant]
    experiment.mesh, main = Mesh(1, 1), experiment.main
    experiment.rollout.num_slots = 8
    main.update.micro_rows = main.update.max_micro = 1
    with open_setting(experiment, tmp_path) as setting:
        on_pages = replace(setting, spec=replace(setting.spec, decode=PAGES))
        found, a = account(on_pages), setting.a
    assert found.stays["weights"] == found.stays["references"] == 2 * N
    assert found.stays["optimizer"] == pytest.approx(12 * N, abs=100)  # and a few counts
    assert found.beside["gradients"] == 4 * N
    assert found.beside["decode weights"] == 2 * N
    # Pages for twice the slots; a token's keys and values of every layer.
    assert found.stays["cache"] == 2 * 8 * 4096 * (2 * a.num_layers * a.num_kv_heads * a.head_dim * 2)


def test_bytes_of_seven_billion_by_hand():
    D, F, V, kv = 3584, 18944, 152064, 4 * 128
    layer = D * D + D + 2 * (D * kv + kv) + D * D + 3 * D * F + 2 * D
    assert 2 * V * D + 28 * layer + D == PARAMETERS["qwen2.5-7b"]


# -- a made-up training on a made-up device ---------------------------------------------------------------------------

MESH = {"data": 4, "model": 4}
DEVICE = Device(
    memory_bytes=Figure(10 * GIB, ""), flops=Figure(100.0, ""), bandwidth=Figure(10.0, ""), links=Figure(8.0, ""),
    network=Figure(1.0, ""), joined=4,
)  # fmt: skip
ASSUMED = Assumed(memory=1.0, products=0.5, bandwidth=1.0, links=1.0)


def made_up(rows: int = 4, slots: int = 8) -> Survey:
    return Survey(
        parameters={"policy": 1}, mesh=MESH, rows=rows, slots=slots, shards=4,
        stays={"weights": Line(1 * GIB), "references": Line(0), "optimizer": Line(2 * GIB),
               "cache": Line(0, slots=GIB / 8)},
        beside={"decode weights": Line(2 * GIB), "batch": Line(0, rows=GIB / 64), "gradients": Line(1 * GIB)},
        needed={"pack": Line(0), "prefill": Line(GIB / 2), "decode": Line(0, slots=GIB / 16), "prepare": Line(0),
                "accumulate": Line(GIB / 2, rows=GIB / 4), "apply": Line(0)},
        costs={"decode": Cost(flops=100.0, traffic=50.0), "accumulate": Cost(
            flops=1000.0, traffic=10.0, sent={("all-gather", ("model",)): 80.0, ("all-reduce", ("data",)): 15.0})},
        passes=1, whole=("heads 3",), compilations=0,
    )  # fmt: skip


@pytest.fixture
def setting(tmp_path):
    experiment = tiny()
    experiment.mesh = Mesh(1, 1)
    with open_setting(experiment, tmp_path) as opened:
        yield opened


def plan(setting, found: Survey, assumed: Assumed = ASSUMED):
    return forecast(found, setting, "made-up", DEVICE, Load(16, 8, 16), assumed)


def test_memory_is_of_the_phase_that_needs_most(setting):
    made = plan(setting, made_up())
    stays, update = 1 + 2 + 1.0, 4 / 64 + 1 + 0.5 + 1
    assert made.peak == (stays + update) * GIB
    assert made.temporary["decode"] == 2.5 * GIB
    assert made.memory["activations, update"] == 1.5 * GIB
    assert made.memory["activations, rollout"] == 0.5 * GIB
    assert made.fits
    assert not plan(setting, made_up(), Assumed(memory=0.6)).fits


def test_the_largest_batch_that_fits(setting):
    made = plan(setting, made_up())
    # Rows: 4 stay, 1.5 beside, n / 64 + n / 4 of 10 GiB: 16.9. Slots: as many as with decoding (5 + n * 3 / 16), and
    # with the update (3 + 2.5625 + n / 8) fit: 26.7.
    assert (made.largest_rows, made.largest_slots) == (16, 24)
    assert plan(setting, made_up(slots=80)).largest_rows == 0
    tried = []
    assert largest(lambda n: tried.append(n) or n <= 1000, 7) == 994
    assert len(tried) < 20


def test_time_is_that_of_the_slowest_of_three(setting):
    made = plan(setting, made_up())
    decode, accumulate = made.timings["decode"], made.timings["accumulate"]
    assert (decode.compute_s, decode.memory_s, decode.bound) == (2.0, 5.0, "memory")
    # Devices of the model axis have fast links, those of the data axis are in other hosts.
    assert (accumulate.compute_s, accumulate.links_s, accumulate.bound) == (20.0, 80 / 8 + 15 / 1, "links")
    assert decode.runs == 2 * 8, "16 episodes in 8 slots, 8 tokens each"
    assert made.seconds == decode.seconds + accumulate.seconds == 16 * 5 + accumulate.runs * 25


def test_how_often_programs_run(setting):
    runs = runs_of(made_up(), setting, Load(16, 8, 60))
    assert runs["prefill"] == 16 * 60 // (8 * 16) + 1  # rows by chunk
    assert runs["accumulate"] == 3  # 16 * 68 tokens in micro-batches of 4 x 96
    assert (runs["pack"], runs["prepare"], runs["apply"]) == (1, 1, 1)


def test_who_is_far_away():
    assert not leaves(("model",), MESH, 4)
    assert leaves(("data",), MESH, 4)
    assert leaves(("data", "model"), MESH, 8)
    assert not leaves(("data", "model"), MESH, 16)
    assert not leaves(("data",), {"replica": 2, "data": 4, "model": 2}, 8)
    assert leaves(("replica",), {"replica": 2, "data": 4, "model": 2}, 8)


def test_no_time_where_the_speed_is_not_known(setting):
    made = forecast(made_up(), setting, "cpu", Device(Figure(GIB, "")), Load(16, 8, 16), ASSUMED)
    assert (dict(made.timings), made.seconds, made.fits) == ({}, 0, False)


def test_a_load_that_no_episode_can_be():
    with pytest.raises(ValueError, match=r"sampled_tokens is 90 and observed_tokens 60: .* at most .* 93"):
        Load(16, 90, 60).check(93)


def test_a_training_without_steps(tmp_path):
    experiment = tiny()
    experiment.mesh, experiment.steps, experiment.warm_up.steps = Mesh(1, 1), 0, 0
    with pytest.raises(ValueError, match=r"steps is 0: give --config.steps=1"), open_setting(experiment, tmp_path):
        pass


def test_a_plan_is_of_devices_that_cannot_be_asked(tmp_path):
    experiment = tiny()
    experiment.mesh, experiment.model.remat = Mesh(1, 1), "auto"
    with pytest.raises(ValueError, match=r"model.remat is 'auto'"), open_setting(experiment, tmp_path):
        pass
