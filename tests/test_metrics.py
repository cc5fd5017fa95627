import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from rlrag.metrics import Peak, Sum, Writer, merge, nothing, num_rows, rewind

parts = st.lists(st.lists(st.integers(-1000, 1000), max_size=5), min_size=1, max_size=6)


@settings(deadline=None)  # the first example compiles
@given(parts)
def test_a_mean_does_not_depend_on_how_it_was_cut(parts):
    values = [value for part in parts for value in part]
    mean = {"mean": Sum(jnp.float32(0), jnp.float32(0)), "peak": Peak(jnp.float32(-jnp.inf))}
    for part in parts:
        total, highest = jnp.float32(sum(part)), jnp.float32(max(part, default=-np.inf))
        mean = merge(mean, {"mean": Sum(total, jnp.float32(len(part))), "peak": Peak(highest)})
    assert float(mean["mean"].value()) == np.float32(sum(values)) / np.float32(max(len(values), 1))
    assert float(mean["peak"].value()) == max(values, default=-np.inf)


def test_nothing_counted_is_zero_and_differentiable():
    value, gradient = jax.value_and_grad(lambda total: Sum(total, jnp.float32(0)).value())(jnp.float32(3))
    assert (float(value), float(gradient)) == (0.0, 0.0)


def test_nothing_changes_nothing():
    metrics = {"mean": Sum(jnp.float32(-3), jnp.float32(2)), "peak": Peak(jnp.float32(-5))}
    merged = merge(nothing(metrics), metrics)
    assert float(merged["mean"].value()) == -1.5
    assert float(merged["peak"].value()) == -5, "a peak may be negative"


def test_metrics_of_different_names_do_not_merge():
    a = Sum(jnp.float32(1), jnp.float32(1))
    with pytest.raises(AssertionError, match=r"differ in \['b'\]"):
        merge({"a": a}, {"a": a, "b": a})


def test_rows_are_written_whole_and_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert num_rows(path) == 0
    rewind(path, 3)  # nothing there: nothing to do
    writer = Writer(tmp_path)
    for step in range(5):
        writer.write("main", step, 10 + step, {"loss": 1 / 3 + step, "tokens": 7})
    assert num_rows(path) == 5
    rewind(path, 3)
    writer.write("main", 3, 13, {"loss": 0.0})  # the writer that was open goes on behind the third row
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0] == {"stage": "main", "step": 0, "loss": 0.3333333, "tokens": 7}
    assert rows[3] == {"stage": "main", "step": 3, "loss": 0.0}
    assert list((tmp_path / "tensorboard").iterdir())
    Writer(tmp_path).close()
    assert num_rows(path) == 4, "opening again keeps what is there"


def test_json_holds_no_nan(tmp_path):
    writer = Writer(tmp_path)
    writer.write("main", 1, 1, {"grad_norm": float("nan"), "ratio_max": np.float32(np.inf), "em": np.float32(0.25)})
    writer.close()

    def refuse(name: str):
        raise ValueError(name)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"stage": "main", "step": 1, "grad_norm": None, "ratio_max": None, "em": 0.25}


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert num_rows(path) == 2
    rewind(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def events(directory):
    """Every event TensorBoard finds: records of length [8 bytes], checksum [4], the event, checksum [4]."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_tensorboard_reads_what_was_written(tmp_path):
    writer = Writer(tmp_path, purge_step=7)
    writer.write("main", 1, 7, {"reward": 0.25, "rollout/tokens_per_s": 1e4})
    writer.write("warm_up", 2, 8, {"loss/nll": np.float32(1.5)})
    writer.close()
    written = events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in written for v in e.summary.value]
    assert scalars == [(7, "main/reward", 0.25), (7, "main/rollout/tokens_per_s", 1e4), (8, "warm_up/loss/nll", 1.5)]
    starts = [e.step for e in written if e.HasField("session_log")]
    assert starts == [7], "what earlier sessions wrote for step 7 and later is forgotten"


def test_metrics_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    """A stub in the package's place: one run a directory, which a later session goes on with."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    stub = types.ModuleType("wandb")
    stub.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for step in (1, 2):
        writer = Writer(tmp_path, wandb_project="search", name="demo")
        writer.write("main", step, 10 + step, {"reward": 0.5})
        writer.close()
    first, second = (options for kind, *rest in calls if kind == "init" for options in rest)
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("search", "demo", "allow")
    assert [c for c in calls if c[0] == "log"] == [("log", {"main/reward": 0.5}, 10 + step) for step in (1, 2)]
    assert calls[-1] == ("finish",)


def test_a_package_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is 'search', but the package is not installed: pip install"):
        Writer(tmp_path, wandb_project="search")
