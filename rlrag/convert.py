"""Models from one form to another: a published folder, the same cut for many processes, a run's parameters.

A folder of ours has what a published one has but for the weights, which lie under parameters/ in Orbax's form.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import jax

from rlrag import config
from rlrag.agents.tokenizer import Tokenizer
from rlrag.checkpoint import PARAMETERS, Checkpoints, load_config, restore_parameters, save_parameters
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.model.families import CONFIG, read_architecture
from rlrag.model.folder import KEPT, keep_description, locate
from rlrag.model.hf import load_parameters
from rlrag.model.hf_export import export_model
from rlrag.model.parameters import Transformer, abstract, initialize

GENERATION = "generation_config.json"


def convert(
    source: str, to: Path, *, model: str = "policy", best: bool = False, dtype: str = "", shard_bytes: int = 5 * 10**9
) -> str:
    """Write the folder `to`; what was written, in words.

    source: a run's directory or a folder of ours gives a folder for transformers; a Hugging Face folder or hub id one
    of ours. model, best: which parameters of a run, and whether the best by held-out score instead of the newest.
    dtype of the tensors; empty: as they are. shard_bytes: of a safetensors file at most.

    Raises ValueError, with the remedy, for what cannot be read or written; `to` then is not there.
    """
    if to.exists():
        raise ValueError(f"{to} is there already: name a folder that is not, or remove it")
    folder = Path(source)
    if (folder / "checkpoints").is_dir() or (folder / "best").is_dir():
        with written(to) as part:
            a, params = read_run(folder, model, best)
            description = folder / KEPT
            export(params, a, part, description if description.is_dir() else None, dtype, shard_bytes)
            if not describe(folder, part):
                return f"{to}: a model for transformers, without a tokenizer (its run has one of its own world)"
        return f"{to}: a model for transformers"
    folder = locate(source)
    found = read_architecture(folder)
    if not isinstance(found, Architecture):
        raise ValueError(f"{source} is an encoder: decoders can be converted")
    if (folder / PARAMETERS).is_dir():
        with written(to) as part:
            own = replace(found, param_dtype=dtype or stored_dtype(folder))
            params = restore_parameters(folder, abstract(own, make_mesh(devices=jax.devices()[:1])))
            export(params, own, part, folder, "", shard_bytes)
            describe(folder, part)
        return f"{to}: a model for transformers"
    with written(to) as part:
        own = replace(found, param_dtype=dtype or stored_dtype(folder))
        save_parameters(part, load_parameters(folder, own))
        keep_description(folder, part)
    return f"{to}: a model for --config.model.path"


@contextmanager
def written(to: Path) -> Iterator[Path]:
    """A folder that takes its name when it is whole."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export(
    params: Transformer, a: Architecture, to: Path, description: Path | None, dtype: str, shard_bytes: int
) -> None:
    if description is not None:
        keep_description(description, to)
    export_model(params, a, to, source=description, dtype=dtype, shard_bytes=shard_bytes)


def describe(run: Path, to: Path) -> bool:
    """Tokenizer and generation settings beside exported weights; whether there is a tokenizer."""
    if not (to / "tokenizer.json").is_file() and (run / "tokenizer" / "tokenizer.json").is_file():
        Tokenizer.load(run / "tokenizer").save(to)
    known = (to / "tokenizer.json").is_file()
    if known and not (to / GENERATION).is_file():
        tokenizer = Tokenizer.load(to)
        (to / GENERATION).write_text(
            json.dumps({"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}, indent=2) + "\n"
        )
    return known


def read_run(directory: Path, model: str, best: bool) -> tuple[Architecture, Transformer]:
    """A model of a run, as its newest checkpoint or its best has it."""
    experiment = config.from_dict(load_config(directory))
    where = directory / ("best" if best else "checkpoints")
    checkpoints = Checkpoints(where) if where.is_dir() else None
    step = checkpoints.latest() if checkpoints else None
    if checkpoints is None or step is None:
        raise ValueError(f"{where} holds no checkpoint: let the training reach one")
    shapes = checkpoints.shapes(step, model)
    own = {field.name: getattr(experiment.model, field.name) for field in fields(Architecture)}
    a = Architecture(**own | {"vocab_size": shapes["embed"][0], "value_head": "value_head" in shapes})
    read: Callable[[], Transformer] = lambda: initialize(a, jax.random.key(0))  # noqa: E731
    params = checkpoints.restore_params(step, jax.jit(read)(), model)
    checkpoints.close()
    return a, params


def stored_dtype(folder: Path) -> str:
    """What config.json says the tensors are; float32 where it says nothing we hold."""
    told = json.loads((folder / CONFIG).read_text())
    found = told.get("dtype") or told.get("torch_dtype")
    return found if found == "bfloat16" else "float32"
