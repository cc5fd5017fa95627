"""From a Hugging Face folder through a training and back."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlrag.convert import convert
from rlrag.evaluate import evaluate_checkpoint
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.families import read_architecture
from rlrag.model.hf import load_parameters
from rlrag.setup import load_policy
from rlrag.train import train
from tests import decoders
from tests.configs.test_multihop import smoke
from tests.tiny_checkpoint import write_checkpoint

SHAPE = Architecture(
    vocab_size=520, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, qkv_bias=True,
    rope_theta=1e6,
)  # fmt: skip


def load(folder, **changes):
    return load_parameters(folder, read_architecture(folder, **changes))


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training from a checkpoint whose folder is gone afterwards."""
    folder = tmp_path_factory.mktemp("published")
    experiment = smoke(folder)
    texts = (folder / "passages.jsonl").read_text().splitlines()
    write_checkpoint(folder / "qwen", texts, SHAPE)
    begun = load(folder / "qwen")
    experiment.model.path, experiment.tokenizer.chat_template = str(folder / "qwen"), True
    experiment.warm_up.steps, experiment.agent.max_tokens = 2, 640
    experiment.main.update.row_tokens = experiment.warm_up.update.row_tokens = 640
    result = train(experiment, folder / "run")
    shutil.rmtree(folder / "qwen")
    return folder / "run", begun, result, folder / "questions.jsonl"


def test_a_training_from_a_published_model(run):
    directory, _, result, questions = run
    config = json.loads((directory / "config.json").read_text())
    assert (config["model"]["num_layers"], config["model"]["qkv_bias"], config["model"]["vocab_size"]) == (2, True, 520)
    assert not (directory / "tokenizer").exists(), "no tokenizer was trained"
    assert result["final"]["questions"] == 4
    # The run is whole without the folder it began from.
    assert len(evaluate_checkpoint(directory, f"{questions}?split=dev")) == 4


def test_a_run_is_exported_for_transformers(run, tmp_path):
    directory, begun, *_ = run
    said = convert(str(directory), tmp_path / "out", shard_bytes=10_000)
    assert said == f"{tmp_path / 'out'}: a model for transformers"
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    trained = load(tmp_path / "out")
    moved = jax.tree.map(lambda old, new: float(np.abs(old - new).max()), begun, trained)
    assert 0 < max(jax.tree.leaves(moved)) < 0.5, "the checkpoint's parameters, some updates later"
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    assert tokenizer.decode(ids["input_ids"]) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    best = convert(str(directory), tmp_path / "best", best=True)
    assert best.endswith("a model for transformers")
    with pytest.raises(ValueError, match="there is no model 'verifier', but policy"):
        convert(str(directory), tmp_path / "other", model="verifier")
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.part").exists()


@pytest.mark.parametrize("name", ["gemma3", "qwen2-windows"])
def test_our_form_and_back_is_bit_by_bit(tmp_path, name):
    folder = decoders.FIXTURES / name
    assert convert(str(folder), tmp_path / "ours") == f"{tmp_path / 'ours'}: a model for --config.model.path"
    convert(str(tmp_path / "ours"), tmp_path / "back")
    same(load(tmp_path / "back"), load(folder))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((folder / file).read_text())
    a = read_architecture(folder)
    assert isinstance(a, Architecture)
    same(load_policy(tmp_path / "ours", a, make_mesh(devices=jax.devices()[:1])), load(folder))


def test_new_rows_are_the_mean_of_the_others(tmp_path):
    from dataclasses import replace

    folder = decoders.FIXTURES / "qwen3"
    old, a = load(folder), read_architecture(folder)
    assert isinstance(a, Architecture)
    wider = replace(a, vocab_size=a.vocab_size + 5, value_head=True)
    new = load_policy(folder, wider, make_mesh(devices=jax.devices()[:1]))
    for mine, wanted in ((new.embed, old.embed), (new.head, old.head)):
        np.testing.assert_array_equal(mine[:-5], wanted)
        np.testing.assert_allclose(mine[-5:], np.broadcast_to(np.mean(wanted, 0), (5, 10)), atol=1e-7)
    assert not np.any(new.value_head)


def test_what_cannot_be_converted_is_one_line(tmp_path):
    folder = decoders.FIXTURES / "qwen2"
    (tmp_path / "there").mkdir()
    for source, to, message in (
        (str(folder), "there", "is there already: name a folder that is not"),
        (str(tmp_path / "absent"), "new", "there is no folder .*absent"),
        ("tests/fixtures/encoders/sentence-bert", "new", "is an encoder: decoders can be converted"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            convert(source, tmp_path / to)
        assert "\n" not in str(told.value) and not (tmp_path / "new").exists()
