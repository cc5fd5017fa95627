"""Adapters in peft's form: what peft wrote is read (tests/golden_adapters.py), what is written is read again."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlrag.model.architecture import TARGETS
from rlrag.model.families import DECODER_NAMES, FAMILIES
from rlrag.model.peft import CONFIG, ROWS, TRUNK, WEIGHTS, export_adapter, read_adapter, read_adapters
from tests.decoders import ADAPTER, FIXTURES
from tests.golden_adapters import MOST, OURS, THEIRS, built, spoken
from tests.model.rehearsal import padded_logits

QWEN2 = FIXTURES / "qwen2"
QUERY = f"{TRUNK}layers.0.self_attn.q_proj.lora_A.weight"


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def changed(tmp_path, settings=None, tensors=None, without=()):
    """The adapter of the fixtures with other settings or tensors."""
    folder = tmp_path / "changed"
    shutil.copytree(ADAPTER, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | (settings or {})))
    found = load_file(folder / WEIGHTS) | (tensors or {})
    save_file({name: tensor for name, tensor in found.items() if name not in without}, folder / WEIGHTS)
    return folder


def test_what_peft_wrote_says_what_it_says_there():
    wanted = load_file(ADAPTER / "expected.safetensors")
    params, a = built(QWEN2, replace(THEIRS, path=str(ADAPTER)))
    said = padded_logits(params, a, wanted["tokens"], [1.0])
    np.testing.assert_allclose(said, wanted["logits"], atol=MOST)
    base = padded_logits(params.replace(adapters=None), a, wanted["tokens"])
    assert np.abs(base - wanted["logits"]).max() > 1, "it does say something"


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma3"])
def test_written_and_read_it_is_the_same_bit_by_bit(tmp_path, name):
    params, a = built(FIXTURES / name, OURS)
    params = spoken(params)
    for adapter in a.adapters.listed:
        (tmp_path / adapter).mkdir()
        written = export_adapter(params, a, adapter, tmp_path / adapter, base=name)
        assert sorted(written) == sorted((tmp_path / adapter).iterdir())
    path = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    again, b = built(FIXTURES / name, replace(OURS, path=path))
    same(again.adapters.layers, params.adapters.layers)
    # What the rows have become is what peft keeps; what was added to them follows from it.
    same(again.table, params.table), same(again.output_head, params.output_head)
    np.testing.assert_allclose(again.adapters.rows, params.adapters.rows, atol=1e-6)
    (tmp_path / "twice").mkdir()
    export_adapter(again, b, "two", tmp_path / "twice", base=name)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_one_of_several_begins_as_it_was_and_the_others_new(tmp_path):
    params, a = built(QWEN2, replace(OURS, rows=0))
    params = spoken(params)
    export_adapter(params, a, "one", tmp_path, base="")
    again, _ = built(QWEN2, replace(OURS, rows=0, path=f",{tmp_path}"))
    for name in TARGETS:
        low, read = params.adapters.layers[name], again.adapters.layers[name]
        same(read.up[:, 1], low.up[:, 0]), same(read.down[:, :, 1], low.down[:, :, 0])
        assert not np.any(read.up[:, 0]) and np.any(read.down[:, :, 0]), "new"


def test_what_is_written_is_what_peft_calls_it(tmp_path):
    """The names and shapes are those of the file that peft wrote."""
    params, a = built(QWEN2, replace(THEIRS, path=str(ADAPTER)))
    export_adapter(params, a, "policy", tmp_path, base="tests/fixtures/decoders/qwen2")
    theirs, ours = load_file(ADAPTER / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name in theirs:  # of rows the difference to the base is kept, which rounds
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-7 if name in ROWS.values() else 0, rtol=0)
    told, said = (json.loads((folder / CONFIG).read_text()) for folder in (ADAPTER, tmp_path))
    for key in said.keys() - {"target_modules", "trainable_token_indices"}:
        assert said[key] == told[key], key
    assert set(said["target_modules"]) == set(told["target_modules"])
    assert said["trainable_token_indices"] == {"embed_tokens": told["trainable_token_indices"]}


def test_dtype_of_the_tensors(tmp_path):
    params, a = built(QWEN2, THEIRS)
    export_adapter(spoken(params), a, "policy", tmp_path, base="", dtype="bfloat16")
    assert {tensor.dtype.name for tensor in load_file(tmp_path / WEIGHTS).values()} == {"bfloat16"}
    read = read_adapter(tmp_path, replace(a))
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("float32")}


def test_every_family_of_decoders_calls_its_matrices_alike():
    for family in FAMILIES.values():
        if family.causal:
            assert all(family.names[f"layers.{name}"] == DECODER_NAMES[f"layers.{name}"] for name in TARGETS)
            assert TRUNK.endswith(f".{family.prefix}")


def test_rslora_is_another_scale(tmp_path):
    folder = changed(tmp_path, {"use_rslora": True, "r": 2, "lora_alpha": 7 / 2**0.5})
    read_adapter(folder, built(QWEN2, THEIRS)[1])
    folder = changed(tmp_path / "other", {"use_rslora": True})
    with pytest.raises(ValueError, match=r"alpha is 7\.0, but .* has lora_alpha 9\.899.*: give --config.*alpha=9\.899"):
        read_adapter(folder, built(QWEN2, THEIRS)[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 4}, r"adapters\.rank is 4, but .*qwen2-adapter has r 2: give --config\.model\.adapters\.rank=2"),
        ({"alpha": 16.0}, r"adapters\.alpha is 16\.0, but .* has lora_alpha 7: give --config.*alpha=7"),
        ({"targets": "query,up"}, r"targets is query,up, but .* has those of query,value,down: give --config.*=q"),
        ({"rows": 2}, r"rows is 2, but in .* rows 37 to 40 of a vocabulary of 41 .*: give --config.*rows=4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_its_flag(change, told):
    with pytest.raises(ValueError, match=told) as error:
        built(QWEN2, replace(THEIRS, **change, path=str(ADAPTER)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"peft_type": "IA3"}}, r"peft_type is 'IA3': only 'LORA' is computed here; merge it"),
        ({"settings": {"use_dora": True}}, "use_dora is True"),
        ({"settings": {"modules_to_save": ["embed_tokens"]}}, r"modules_to_save is \['embed_tokens'\]"),
        ({"settings": {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa'"),
        ({"settings": {"trainable_token_indices": [5, 6, 7, 8]}}, r"rows 5 to 8 of a vocabulary of 41 .*: merge it"),
        ({"tensors": {f"{TRUNK}norm.lora_magnitude_vector": np.zeros(3)}}, r"holds '.*magnitude_vector', which is not"),
        ({"without": [QUERY]}, r"lacks '.*layers\.0\.self_attn\.q_proj\.lora_A\.weight': an adapter of every layer"),
        ({"tensors": {QUERY: np.zeros((2, 9), "float32")}}, r"query has the shape \(2, 9\), the model asks for"),
        ({"without": [ROWS["embed_tokens"]]}, None),  # rows of ours that it says nothing of begin new
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, change, told):
    folder = changed(tmp_path, **change)
    a = built(QWEN2, THEIRS)[1]
    if told is None:
        assert read_adapter(folder, a).rows is None
        return
    with pytest.raises(ValueError, match=told) as error:
        read_adapter(folder, a)
    assert "\n" not in str(error.value)


def test_absent_and_broken_files_are_told(tmp_path):
    a = built(QWEN2, THEIRS)[1]
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json in .*: give a folder that peft's"):
        read_adapter(tmp_path, a)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_adapter(tmp_path, a)
    shutil.copy(ADAPTER / CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"there is no adapter_model\.safetensors in .*safe_serialization=True"):
        read_adapter(tmp_path, a)
    (tmp_path / WEIGHTS).write_bytes(b"\x00" * 9)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_adapter(tmp_path, a)


def test_rows_that_all_adapters_share_must_agree(tmp_path):
    rows = load_file(ADAPTER / WEIGHTS)[ROWS["embed_tokens"]]
    other = changed(tmp_path, tensors={ROWS["embed_tokens"]: rows + 1})
    a = replace(built(QWEN2, THEIRS)[1], adapters=replace(THEIRS, names="one,two", path=f"{ADAPTER},{other}"))
    with pytest.raises(ValueError, match="whose folders differ in rows of the vocabulary, which all adapters share"):
        read_adapters(a)
    assert len(read_adapters(replace(a, adapters=replace(a.adapters, path=f"{ADAPTER},{ADAPTER}")))) == 2
