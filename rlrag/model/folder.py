"""The folder of a published model: on this machine, or fetched from the Hugging Face hub. Imports no JAX."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from rlrag.model.families import CONFIG

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What is small, and what a model is told by when its weights have changed.
DESCRIPTION = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", CONFIG,
)  # fmt: skip
KEPT = "model"  # in the directory of a run: what describes the model it began from
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT_S = 10.0


def locate(path: str) -> Path:
    """The folder that a path or a hub id (owner/name) names; the hub's files lie in its cache.

    Raises ValueError where there is no such folder, and where the hub cannot give one.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(path):
        raise ValueError(f"there is no folder {path!r} (seen from {Path.cwd()}): give that of a Hugging Face model")
    import huggingface_hub

    wanted = [*DESCRIPTION, *WEIGHTS]
    try:
        # Asked first, since it is asked once: without a network a download tries again and again.
        huggingface_hub.HfApi().model_info(path, timeout=TIMEOUT_S)
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
    except Exception as error:  # of the hub's, of HTTP, of the system: many kinds, one meaning
        with suppress(Exception):
            return Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted, local_files_only=True))
        reason = str(error).strip().partition("\n")[0].rstrip(".:")[:160] or type(error).__name__
        raise ValueError(
            f"{path!r} is no folder here and cannot be fetched from the hub ({type(error).__name__}: {reason}): give a "
            "folder, or fetch it where there is a network"
        ) from None


def folder_of(path: str, workdir: Path | None) -> Path:
    """Where a run finds what describes the model it began from: what it kept itself, or the folder `path` names."""
    kept = workdir and workdir / KEPT
    return kept if kept and (kept / CONFIG).is_file() else locate(path)


def keep_description(folder: Path, to: Path) -> None:
    """Copy everything but the weights, config.json last: what an export needs once the weights have changed."""
    to.mkdir(parents=True, exist_ok=True)
    for name in DESCRIPTION:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
