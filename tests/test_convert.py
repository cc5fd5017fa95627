"""From a Hugging Face folder through a training and back."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from rlrag.convert import convert, read_run, unlike
from rlrag.evaluate import evaluate_checkpoint
from rlrag.mesh import make_mesh
from rlrag.model.architecture import TARGETS, Adapters, Architecture
from rlrag.model.families import read_architecture
from rlrag.model.hf import load_parameters
from rlrag.model.parameters import furnished, grown, merged
from rlrag.model.peft import read_adapter
from rlrag.setup import load_policy
from rlrag.train import train
from tests import decoders
from tests.configs.test_multihop import smoke
from tests.reference_check import say
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
    experiment.warm_up.steps, experiment.warm_up.evaluate_every, experiment.steps = 2, 2, 0
    experiment.agent.max_tokens = 640
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


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A training of adapters from a checkpoint, and what the checkpoint held."""
    folder = tmp_path_factory.mktemp("adapted")
    experiment = smoke(folder)
    write_checkpoint(folder / "qwen", (folder / "passages.jsonl").read_text().splitlines(), SHAPE)
    experiment.model.path, experiment.tokenizer.chat_template = str(folder / "qwen"), True
    experiment.warm_up.steps, experiment.agent.max_tokens = 2, 640
    experiment.main.update.row_tokens = experiment.warm_up.update.row_tokens = 640
    experiment.model.adapters = Adapters(rank=2, alpha=3.0, names="policy,other", rows=3)
    experiment.main.loss.kl, experiment.main.loss.reference = 0.01, "base"
    train(experiment, folder / "run")
    return folder / "run", folder / "qwen", experiment


def test_a_run_of_adapters_is_evaluated_with_them(adapted):
    run, *_ = adapted
    stored = [json.loads(line) for line in (run / "predictions_final.jsonl").read_text().splitlines()]
    rows = evaluate_checkpoint(run, f"{run.parent / 'questions.jsonl'}?split=dev")
    assert sorted(rows, key=lambda row: row["id"]) == sorted(stored, key=lambda row: row["id"])


def test_an_adapter_is_merged_into_its_base(adapted, tmp_path):
    run, published, _ = adapted
    base, (a, params) = load(published), read_run(run, "policy", False)
    assert a.adapters.listed == ("policy", "other")
    said = convert(str(run), tmp_path / "out")
    assert said == f"{tmp_path / 'out'}: a model for transformers, policy merged into its base"
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    found = load(tmp_path / "out")
    same(found, merged(params, a, "policy"))
    for name in TARGETS:
        assert np.any(getattr(found.layers, name) != getattr(base.layers, name)), f"{name} has learned"
    np.testing.assert_array_equal(found.embed[:-3], base.embed[:-3])
    assert np.any(found.embed[-3:] != base.embed[-3:])
    convert(str(run), tmp_path / "other", adapter="other", best=True)
    other = load(tmp_path / "other")  # no role has it: only the rows, which all adapters share, have learned
    same(other.layers, base.layers)
    convert(str(run), tmp_path / "base", adapter="none")
    same(load(tmp_path / "base"), base)


def test_an_adapter_alone_begins_another_training_bit_by_bit(adapted, tmp_path):
    run, published, experiment = adapted
    a, params = read_run(run, "policy", False)
    assert convert(str(run), tmp_path / "alone", peft=True) == (
        f"{tmp_path / 'alone'}: the adapter policy for peft, on {published}"
    )
    files = {file.name for file in (tmp_path / "alone").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert "config.json" not in files, "which would say that a whole model is here"
    again = replace(experiment, steps=0)
    again.warm_up = replace(experiment.warm_up, steps=0)
    again.model = replace(experiment.model)
    again.model.adapters = replace(experiment.model.adapters, names="policy", path=str(tmp_path / "alone"))
    train(again, tmp_path / "run")
    b, begun = read_run(tmp_path / "run", "policy", False)
    same(merged(begun, b, "policy"), merged(params, a, "policy"))
    for name, low in begun.adapters.layers.items():
        np.testing.assert_array_equal(low.up[:, 0], params.adapters.layers[name].up[:, 0])
    again.model.adapters.rank = 4
    with pytest.raises(ValueError, match=r"adapters\.rank is 4, but .*alone has r 2: give --config.*rank=2"):
        train(again, tmp_path / "wrong")
    again.model.adapters.rank, again.warm_start = 2, str(run)
    with pytest.raises(
        ValueError, match=r"adapters\.path is .*alone', but .*run, which warm_start names, has adapters"
    ):
        train(again, tmp_path / "wrong")


def test_without_its_adapters_the_model_is_its_reference_bit_by_bit(adapted):
    said = say(adapted[0])
    where = said.sampled
    assert where.sum() > 50
    np.testing.assert_array_equal(said.reference[where], said.off[where])
    np.testing.assert_array_equal(said.reference[where], said.begun[where])
    assert np.abs(said.on - said.reference)[where].max() > 1e-4, "the adapters say something"


def test_an_adapter_is_written_for_its_own_base_alone(adapted, tmp_path):
    run, published, _ = adapted
    a, params = read_run(run, "policy", False)
    assert not unlike(merged(params, a), a, str(published))
    told = {"": "it began from no published model"}
    other = decoders.FIXTURES / "qwen2"
    told[str(other)] = f"{other} has 41 rows of the vocabulary, the run 520"
    for base, why in told.items():
        assert unlike(merged(params, a), a, base) == why
    # A vocabulary that has grown, a base of bytes, one that has learned.
    wider = replace(a, vocab_size=523)
    why = unlike(grown(merged(params, a), wider), wider, str(published))
    assert why == f"{published} has 520 rows of the vocabulary, the run 523"
    bytes_ = replace(a, base="int8")
    held = furnished(merged(params, a), bytes_, jax.random.key(0))
    assert unlike(merged(held, bytes_), bytes_, str(published)) == f"{published} has another layers.query"
    learned = merged(params, a).replace(final_norm=params.final_norm + 1)
    assert unlike(learned, a, str(published)) == f"{published} has another final_norm"
    with pytest.raises(ValueError, match=r"on its own base alone, and .*merge it \(without --peft\), or") as error:
        convert(str(run), tmp_path / "alone", peft=True, base=str(other))
    assert "\n" not in str(error.value) and not (tmp_path / "alone").exists()
    # As it says: the base alone, then the adapter on it.
    convert(str(run), tmp_path / "base", adapter="none")
    convert(str(run), tmp_path / "alone", peft=True, adapter="other", base=str(tmp_path / "base"))
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    read = read_adapter(tmp_path / "alone", a)
    np.testing.assert_array_equal(read.layers["up"].up, params.adapters.layers["up"].up[:, 1])


def test_flags_of_adapters_that_go_wrong_are_told(run, adapted, tmp_path):
    plain_run, with_adapters = str(run[0]), str(adapted[0])
    for source, options, message in (
        (with_adapters, {"adapter": "second"}, "has no adapter 'second', but policy,other"),
        (
            with_adapters,
            {"adapter": "none", "peft": True},
            "has no adapter 'none', but policy,other: --peft writes one",
        ),
        (with_adapters, {"base": "x"}, "--base=x is the model that an adapter alone is written for: give --peft too"),
        (plain_run, {"adapter": "policy"}, "has no adapter 'policy', but none"),
        (plain_run, {"peft": True}, "has no adapter: --peft writes one"),
        (str(adapted[1]), {"peft": True}, "is no run, which --peft wants: name a --workdir"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            convert(source, tmp_path / "new", **options)
        assert "\n" not in str(told.value) and not (tmp_path / "new").exists()


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
