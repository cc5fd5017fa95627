"""What is written for transformers: every tensor as it was read, the configuration, the files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlrag.model.architecture import Architecture
from rlrag.model.families import read_architecture
from rlrag.model.hf import INDEX, load_parameters, weight_files
from rlrag.model.hf_export import export_model, find_config
from rlrag.model.parameters import grown
from tests import decoders

NAMES = [checkpoint.name for checkpoint in decoders.CHECKPOINTS]


def read(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def load(name, **changes):
    folder = decoders.FIXTURES / name
    a = dataclasses.replace(read_architecture(folder), **changes)
    assert isinstance(a, Architecture)
    return load_parameters(folder, a), a


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_every_tensor_bit_by_bit(tmp_path, name):
    params, a = load(name)
    written = export_model(params, a, tmp_path, shard_bytes=4000)
    original, again = read(decoders.FIXTURES / name), read(tmp_path)
    assert original.keys() == again.keys()
    for tensor in original:
        assert again[tensor].dtype == original[tensor].dtype
        np.testing.assert_array_equal(again[tensor], original[tensor])
    assert sorted(written) == sorted(tmp_path.iterdir()), "nothing else is left"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 4000 for file in weight_files(tmp_path))
    total = sum(tensor.nbytes for tensor in original.values())
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == total


def test_bfloat16_comes_back_from_float32_parameters(tmp_path):
    """A checkpoint in bfloat16, trained in float32, written in bfloat16: nothing is rounded on the way."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    params, a = load("qwen3", param_dtype="bfloat16")
    export_model(params, a, first, source=decoders.FIXTURES / "qwen3")
    wide = dataclasses.replace(a, param_dtype="float32")
    export_model(load_parameters(first, wide), wide, second, source=first, dtype="bfloat16")  # type: ignore[arg-type]
    one, two = read(first), read(second)
    assert {tensor.dtype.name for tensor in one.values()} == {"bfloat16"}
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert json.loads((second / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_written_that_reads_as_the_same_model(tmp_path, name):
    _, a = load(name)
    config = find_config(a, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == a


def test_the_configuration_a_model_came_with_is_kept(tmp_path):
    folder = decoders.FIXTURES / "gemma3"
    params, a = load("gemma3")
    a = dataclasses.replace(a, vocab_size=70)
    params = grown(params, a)  # type: ignore[arg-type]
    export_model(params, a, tmp_path, source=folder)
    old, new = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path))
    assert new == old | {"vocab_size": 70, "dtype": "float32"}
    np.testing.assert_array_equal(load_parameters(tmp_path, a).embed, params.embed)  # type: ignore[union-attr]
    # A folder that tells another model is not asked.
    assert find_config(load("qwen2")[1], folder)["model_type"] == "qwen2"


def test_what_no_family_computes_is_one_line(tmp_path):
    a = dataclasses.replace(load("qwen2")[1], embed_scale=3.0)
    with pytest.raises(ValueError, match=r"no family that computes this model .embed_scale 3.0.: one that was") as told:
        export_model(jax.tree.map(np.asarray, load("qwen2")[0]), a, tmp_path)
    assert "\n" not in str(told.value)
