"""Ceilings are known work over measured time."""

import pytest

from kernels import ceilings
from kernels.ceilings import Ceilings, Probe


@pytest.fixture
def clock(monkeypatch):
    """A clock that probes set forward."""
    now = [0.0]
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: now[0])
    return now


def taking(now: list[float], *seconds: float) -> Probe:
    """Of 60 units of work, which takes as long as said, call after call; the first warms up."""
    left = [0.0, *seconds]

    def call() -> int:
        now[0] += left.pop(0)
        return 0

    return Probe(call, 60.0)


def test_rates_are_work_by_median_seconds_and_memory_is_the_faster_probe(clock):
    probes = Ceilings(taking(clock, 1, 3, 2), [taking(clock, 4, 4, 9), taking(clock, 6, 1, 3)])
    probes.sample(3)
    assert probes.flops == 30
    assert probes.bandwidth == 20


def test_another_product_begins_without_samples(clock):
    first = Ceilings(taking(clock, 1), [taking(clock, 1, 0, 5)])
    first.sample()
    second = first.with_product(taking(clock, 2))
    second.sample()
    assert (first.flops, second.flops, second.bandwidth) == (60, 30, 12)


def test_the_probes_of_this_platform_run():
    probes = ceilings.open_ceilings("float32", ceilings.QUICK)
    probes.sample()
    assert probes.flops > 1e8
    assert probes.bandwidth > 1e8
    assert ceilings.matrix_product(2, 3, 5, "float32").work == 60
    assert ceilings.memory_read(64).call() == 16
    assert ceilings.memory_update(64).call().tolist() == [2.0] * 16
