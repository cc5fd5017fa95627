"""Checkpoints as transformers saves them: what torch makes of them (tests/golden_encoders.py), and wrong ones."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlrag.agents.workflow import Sampling
from rlrag.mesh import make_mesh
from rlrag.model import bert, families, hf
from rlrag.model.architecture import Architecture, EncoderArchitecture
from rlrag.model.decoding import pack
from rlrag.model.parameters import num_parameters
from rlrag.model.transformer import trunk
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from tests import decoders
from tests.encoders import CHECKPOINTS, FIXTURES
from tests.model.rehearsal import cached_logits, padded_logits

BERT, SHARDS = FIXTURES / "sentence-bert", FIXTURES / "qwen2-shards"


@pytest.mark.parametrize("name", [checkpoint.name for checkpoint in CHECKPOINTS])
def test_hidden_states_are_those_of_torch(name):
    folder = FIXTURES / name
    wanted = load_file(folder / "expected.safetensors")
    a = families.read_architecture(folder)
    if isinstance(a, Architecture):
        a = dataclasses.replace(a, tied=True)  # some were saved without a head
    params = hf.load_parameters(folder, a)
    tokens, column = wanted["tokens"], np.arange(wanted["tokens"].shape[1])
    segment = (column < wanted["lengths"][:, None]).astype(np.int32)
    if isinstance(a, EncoderArchitecture):
        hidden = jax.jit(bert.encode, static_argnums=1)(params, a, tokens, segment * column, segment)
    else:
        parent = np.zeros((len(tokens), 2), np.int32)
        hidden = jax.jit(trunk, static_argnums=1)(params, a, tokens, segment * column, segment, parent)
    np.testing.assert_allclose(hidden * segment[..., None], wanted["hidden"], atol=1e-5)


@pytest.fixture(scope="module", params=[checkpoint.name for checkpoint in decoders.CHECKPOINTS])
def decoder(request):
    """A decoder of each family as transformers saved it, and what torch makes of it (tests/golden_decoders.py)."""
    folder = decoders.FIXTURES / request.param
    a = families.read_architecture(folder)
    assert isinstance(a, Architecture)
    params = hf.load_parameters(folder, a)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_parameters(a)
    return params, a, load_file(folder / "expected.safetensors")


def test_logits_of_every_family_are_those_of_torch(decoder):
    params, a, wanted = decoder
    np.testing.assert_allclose(padded_logits(params, a, wanted["tokens"]), wanted["logits"], atol=1e-4)
    ids, logits = cached_logits(params, a, wanted["tokens"])
    np.testing.assert_array_equal(ids, wanted["continued"])
    np.testing.assert_allclose(logits.max(-1), wanted["cached"], atol=1e-4)


def test_the_engine_continues_every_family_as_torch_does(decoder):
    """64 greedy tokens after prompts of different lengths, over pages, chunks and slots."""
    params, a, wanted = decoder
    spec = Spec(
        num_slots=2, num_pages=64, page_size=4, max_tokens=96, burst=16, prefill_rows=2, prefill_chunk=5,
        prefill_chunks=2, num_kept=0,
    )  # fmt: skip
    sampler = Decoder(a, spec, [b"x"] * a.vocab_size, -1, make_mesh(devices=jax.devices()[:1]))
    sampler.start(pack(params, a), jax.random.key(0))
    for uid, (row, length) in enumerate(zip(wanted["tokens"], decoders.PROMPTS)):
        stream = sampler.open(uid, 0)
        stream.append(row[:length].tolist())
        sampler.submit(stream, uid, (), decoders.CONTINUED, Sampling(temperature=0.0), None)
    found = {}
    while sampler.launch():
        found |= {call.ticket: call for _, call in sampler.collect()}
    for uid, ids in enumerate(wanted["continued"]):
        np.testing.assert_array_equal(found[uid].emitted()[0], ids)


def copied(folder, tmp_path, **config):
    """A copy of a checkpoint with other values in config.json; None takes one away."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    changed = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    return copy


def rewritten(folder, tmp_path, change):
    """A copy whose tensors went through `change`."""
    copy = copied(folder, tmp_path)
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors")
    return copy


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def load(folder, **changes):
    a = dataclasses.replace(families.read_architecture(folder), **changes)
    return hf.load_parameters(folder, a)


def test_names_with_and_without_prefix_and_of_old_norms(tmp_path):
    def change(tensors):
        renamed = {f"bert.{name}": tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {
            next((name.replace(a, b) for a, b in old.items() if a in name), name): t for name, t in renamed.items()
        }
        more = {"bert.embeddings.position_ids": np.arange(40)[None], "cls.predictions.bias": np.zeros(9, np.float32)}
        return renamed | more

    same(load(rewritten(BERT, tmp_path, change)), load(BERT))


def test_shards_are_one_model(tmp_path):
    copy, whole = copied(SHARDS, tmp_path), {}
    for shard in sorted(copy.glob("model-*.safetensors")):
        whole |= load_file(shard)
        shard.unlink()
    (copy / hf.INDEX).unlink()
    save_file(whole, copy / hf.WEIGHTS)
    same(load(copy), load(SHARDS))
    assert [file.name for file in hf.weight_files(copy)] == [hf.WEIGHTS]
    assert len(hf.weight_files(SHARDS)) == 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(tmp_path, dtype):
    copy = rewritten(BERT, tmp_path, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})
    same(load(copy), jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), load(BERT)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(BERT, param_dtype="bfloat16"))} == {"bfloat16"}


def test_a_head_is_read_or_left_and_a_value_head_starts_anew():
    params = load(SHARDS, value_head=True)
    stored = [tensor for file in hf.weight_files(SHARDS) for name, tensor in load_file(file).items() if "head" in name]
    np.testing.assert_array_equal(params.head, stored[0])
    assert not np.any(params.value_head)
    assert load(SHARDS, tied=True).head is None
    with pytest.raises(ValueError, match=r"the tensor 'lm_head.weight' is missing"):
        load(FIXTURES / "llama-mean")


def test_parameters_are_laid_over_the_mesh():
    a = families.read_architecture(BERT)
    params = hf.load_parameters(BERT, a, mesh=make_mesh(devices=jax.devices()[:1]))
    same(params, load(BERT))
    assert tuple(params.layers.up.sharding.spec) == (None, "data", "model")


LAYER = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: x for name, x in t.items() if name != LAYER}, f"the tensor '{LAYER}' is missing"),
        (lambda t: t | {LAYER: t[LAYER][1:]}, rf"'{LAYER}' has the shape \[11, 20\], config.json asks for \[12, 20\]"),
        (lambda t: t | {LAYER: t[LAYER].astype(np.int8)}, f"'{LAYER}' is I8: give one of"),
        (lambda t: t | {"encoder.layer.2.output.dense.bias": t[LAYER]}, "'encoder.layer.2.*' is not part of the model"),
    ],
)
def test_a_wrong_tensor_is_one_line(tmp_path, change, message):
    copy = rewritten(BERT, tmp_path, change)
    with pytest.raises(ValueError, match=message) as raised:
        load(copy)
    assert "\n" not in str(raised.value)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config.json in .*absent"):
        families.read_architecture(tmp_path / "absent")
    copy = copied(SHARDS, tmp_path)
    (copy / "model-00002-of-00003.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is not a whole safetensors file"):
        load(copy)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard 'model-00002-of-00003.safetensors', which is not in"):
        load(copy)
    (copy / hf.INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match=r"names the shard '../a.safetensors'"):
        load(copy)
    (copy / hf.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, not an object"):
        load(copy)
    (copy / hf.INDEX).unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors and no model.safetensors.index.json in .*save"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON .*fetch it again"):
        load(copy)
