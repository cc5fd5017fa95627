"""What is wrong, slow or does not build is told, and stops nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import ceilings, measurement
from kernels.measurement import Case, again, difference, measure


def fails(x):
    raise NotImplementedError("no such\nkernel")


def crashes(x):
    def refuse(value):
        raise RuntimeError("out of memory")

    return jax.pure_callback(refuse, x, x)


CASE = Case(
    "sum", "64 x 64",
    {
        "reference": lambda x: (x @ x.T).sum(1),
        "right": lambda x: x @ x.sum(0),
        "wrong": lambda x: (x @ x.T).sum(1) * 1.1,
        "unbuilt": fails,
        "crashing": crashes,
    },
    (jnp.arange(4096.0).reshape(64, 64) / 4096,), flops=2.0 * 64**3, moved_bytes=64 * 64 * 4,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    probes = ceilings.open_ceilings("float32", ceilings.QUICK)
    told = []
    rows = {row.implementation: row for row in measure(CASE, 3, probes, note=told.append)}
    assert told == [*CASE.functions, ""]
    return rows


def test_every_implementation_has_a_row(rows):
    assert list(rows) == list(CASE.functions)
    assert rows["reference"].error == rows["right"].error == ""
    assert rows["reference"].time_ratio == 1
    assert 0 < rows["right"].min_s <= rows["right"].median_s
    assert rows["right"].share == rows["right"].rate / rows["right"].ceiling


def test_the_check_finds_wrong_numbers(rows):
    assert rows["right"].check < 1e-6
    assert rows["wrong"].check == pytest.approx(0.1, rel=1e-3)
    assert rows["wrong"].error == "wrong numbers"
    assert np.isnan(rows["reference"].check)


def test_what_does_not_build_or_run_is_told_in_one_line(rows):
    assert rows["unbuilt"].error == "NotImplementedError: no such kernel"
    assert rows["crashing"].error.startswith("JaxRuntimeError: ")
    assert np.isnan(rows["crashing"].median_s)
    assert rows["crashing"].temporary_bytes >= 0  # it compiled: what it would have taken is known


def test_a_deadline_leaves_one_round():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return x

    measure(CASE._replace(functions={"reference": counted}), 9, ceilings.open_ceilings("float32", ceilings.QUICK), 0)
    jax.effects_barrier()
    assert len(calls) == 3  # twice to warm up, one round


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([1.0, -4.0, np.inf, np.nan], 0),
        ([1.0, -3.0, np.inf, np.nan], 0.25),
        ([1.0, -4.0, 1.0, np.nan], np.inf),
        ([1.0, -4.0, np.inf, 0.0], np.inf),
        ([np.nan, -4.0, np.inf, np.nan], np.inf),
    ],
)
def test_differences_are_shares_of_the_largest_entry(other, expected):
    right = {"a": jnp.array([1.0, -4.0, np.inf, np.nan]), "b": jnp.ones(3)}
    assert difference(right, right | {"a": jnp.array(other)}) == expected


def test_many_calls_in_one_program_are_all_made():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return x * 2

    assert again(counted, 5, jnp.ones(3)) == 10
    jax.effects_barrier()
    assert len(calls) == 5


def test_nothing_is_moved_out_of_the_loop():
    text = jax.jit(lambda x: again(lambda x: x @ x, 5, x)).lower(jnp.ones((32, 32))).compile().as_text()
    before, _, entry = text.partition("ENTRY")
    assert " dot(" in before
    assert " dot(" not in entry
    assert measurement.peak_bytes() >= 0
