"""The table of measured tiles: its buckets, and what is answered where nothing was measured."""

import json

import pytest

from kernels import tiles

ENTRY = {"tiles": {"block_n": 128}, "time_s": 0.01, "jax": "0.11.2", "date": "2026-09-01"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"NVIDIA H200": {"product": {"hidden=2048 vocabulary=262144": ENTRY}}}))
    monkeypatch.setattr(tiles, "PATH", path)
    tiles.read.cache_clear()
    yield
    tiles.read.cache_clear()


@pytest.mark.parametrize(
    ("device", "operation", "shape", "found"),
    [
        ("NVIDIA H200", "product", {"hidden": 2048, "vocabulary": 151_936}, {"block_n": 128}),
        ("NVIDIA H200", "product", {"vocabulary": 152_064, "hidden": 1025}, {"block_n": 128}),
        ("NVIDIA H200", "product", {"hidden": 2049, "vocabulary": 151_936}, {}),
        ("NVIDIA H200", "other", {"hidden": 2048, "vocabulary": 151_936}, {}),
        ("NVIDIA H100", "product", {"hidden": 2048, "vocabulary": 151_936}, {}),
    ],
)
def test_lookup(table, device, operation, shape, found):
    assert tiles.lookup(operation, device, **shape) == found


def test_an_answer_may_be_changed_without_changing_the_table(table):
    tiles.lookup("product", "NVIDIA H200", hidden=2048, vocabulary=151_936)["block_n"] = 1
    assert tiles.lookup("product", "NVIDIA H200", hidden=2048, vocabulary=151_936) == {"block_n": 128}


def test_buckets_round_up_to_powers_of_two():
    assert tiles.bucket(b=3, a=4, c=1) == "a=4 b=4 c=1"


def test_the_committed_table_is_well_formed():
    for operations in tiles.read().values():
        for buckets in operations.values():
            for entry in buckets.values():
                assert set(entry) >= {"tiles", "time_s", "jax", "date"}
                assert all(isinstance(size, int) for size in entry["tiles"].values())


def test_the_kind_of_device_is_a_name():
    assert tiles.lookup("nothing", tiles.device_kind(), tokens=1) == {}
