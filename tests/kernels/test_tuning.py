"""The best candidate is written where the kernel looks it up."""

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kernels import ceilings, tiles, tuning
from kernels.advantage import api as advantage_api
from kernels.dispatch import Implementation

SLOW, FAST, BROKEN = {"block": 1}, {"block": 2}, {"block": 3}


@pytest.fixture
def tiled(tmp_path, monkeypatch):
    """An implementation of `advantage` that sleeps as long as its tile says."""
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"other device": {"advantage": {}}}))
    monkeypatch.setattr(tiles, "PATH", path)
    tiles.read.cache_clear()

    def recurrence(*arguments, num_groups):
        rows, tokens = arguments[0].shape
        found = tiles.lookup("advantage", tiles.device_kind(), rows=rows, tokens=tokens)
        if found == BROKEN:
            raise NotImplementedError
        wait = 0.02 if found == SLOW else 0.0

        def slept(y):
            time.sleep(wait)
            return y

        y = advantage_api.IMPLEMENTATIONS["reference"].run(*arguments, num_groups=num_groups)
        return jax.pure_callback(slept, y, y)

    module = SimpleNamespace(TILES=(SLOW, BROKEN, FAST))
    monkeypatch.setitem(advantage_api.IMPLEMENTATIONS, "tiled", Implementation(recurrence))
    monkeypatch.setattr(tuning, "module_of", lambda entry: module if entry.run is recurrence else None)
    yield path
    tiles.read.cache_clear()


def test_the_fastest_candidate_is_written(tiled, capsys):
    probes = ceilings.open_ceilings("float32", ceilings.QUICK)
    told = tuning.tune(("advantage", "uncertainty"), "quick", 1, probes)
    assert told == f"1 entries written to tiles.json for {tiles.device_kind()}"
    table = json.loads(tiled.read_text())
    (entry,) = table[tiles.device_kind()]["advantage"].values()
    assert entry["tiles"] == FAST
    assert entry["jax"] == jax.__version__
    assert table["other device"] == {"advantage": {}}
    assert tiles.lookup("advantage", tiles.device_kind(), rows=64, tokens=1024) == FAST
    assert "failed" in capsys.readouterr().out


def test_where_nothing_has_tiles_it_is_said_in_one_line():
    probes = ceilings.open_ceilings("float32", ceilings.QUICK)
    told = tuning.tune(("advantage",), "quick", 1, probes)
    assert told == "nothing to tune: no implementation of advantage that runs on cpu has tiles"


def test_answers_are_taken_back():
    with tuning.answered({"block": 7}) as asked:
        assert tiles.lookup("product", tiles.device_kind(), rows=3) == {"block": 7}
        assert tiles.lookup("product", "another device", rows=3) == {}
    assert asked == {("product", "rows=4")}
    assert tiles.lookup("product", tiles.device_kind(), rows=3) == {}
    assert jnp.ones(1).sum() == 1
