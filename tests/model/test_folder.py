"""Where a published model is found."""

import json

import pytest

from rlrag.model.folder import DESCRIPTION, KEPT, folder_of, keep_description, locate
from tests.decoders import FIXTURES


def test_a_folder_is_itself():
    assert locate(str(FIXTURES / "qwen2")) == FIXTURES / "qwen2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/absent/deeper", "there is no folder 'runs/absent/deeper' .seen from /"),
        ("/absent", "there is no folder '/absent'"),
        ("owner/name", "'owner/name' is no folder here and cannot be fetched from the hub .ConnectError: no network"),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, tmp_path, path, message):
    import huggingface_hub

    class Unreachable:
        def model_info(self, path, timeout):
            raise type("ConnectError", (OSError,), {})("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message) as told:
        locate(path)
    assert "\n" not in str(told.value)


def test_a_hub_id_is_fetched_without_what_is_not_needed(monkeypatch, tmp_path):
    """Not the other frameworks' weights, nor anything that can run code."""
    import huggingface_hub

    asked = {}

    class Api:
        def model_info(self, path, timeout):
            asked["first"] = (path, timeout)

    def snapshot(path, allow_patterns, local_files_only=False):
        asked["patterns"] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("owner/name") == tmp_path
    assert asked["first"] == ("owner/name", 10.0)
    assert {"*.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(asked["patterns"])
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["patterns"])


def test_a_run_keeps_what_describes_its_model(tmp_path):
    source = FIXTURES / "qwen2"
    assert folder_of(str(source), tmp_path) == folder_of(str(source), None) == source
    keep_description(source, tmp_path / KEPT)
    assert folder_of("gone/away", tmp_path) == tmp_path / KEPT
    assert {file.name for file in (tmp_path / KEPT).iterdir()} == {"config.json", "generation_config.json"}
    assert json.loads((tmp_path / KEPT / "config.json").read_text())["model_type"] == "qwen2"
    assert DESCRIPTION[-1] == "config.json", "copied last: it says that the folder is whole"
