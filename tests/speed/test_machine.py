"""Compilations are counted, memory is known, a trace can be read."""

import gzip
import json

import jax
import jax.numpy as jnp

from rlrag.speed import machine


def test_compilations_inside_are_counted_and_no_others():
    with machine.compilations() as found:
        jax.jit(lambda x: x * 3.25 + 1)(2.0)
    assert found.programs >= 1
    assert found.seconds > 0
    before = found.programs
    jax.jit(lambda x: x * 7.5 + 1)(2.0)
    assert found.programs == before


def test_what_a_figure_was_taken_on():
    about = machine.described("python -m x")
    assert about["jax"] == jax.__version__
    assert about["command"] == "python -m x"
    assert jax.devices()[0].device_kind in about["device"]
    assert about["memory_bytes"] == machine.memory_limit() > 2**30
    assert machine.peak_bytes() > 2**20


def test_a_trace_can_be_read(tmp_path):
    with machine.profiled(str(tmp_path)):
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [path.stat().st_size > 0 for path in tmp_path.rglob("*.xplane.pb")] == [True]


def test_no_folder_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with machine.profiled(""):
        pass
    assert not list(tmp_path.iterdir())
