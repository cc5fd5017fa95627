"""Models from one form to another: a published folder, the same cut for many processes, a run's parameters.

A folder of ours has what a published one has but for the weights, which lie under parameters/ in Orbax's form. A run's
adapter is merged into its base, or written alone, for peft.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlrag import config
from rlrag.agents.tokenizer import Tokenizer
from rlrag.checkpoint import PARAMETERS, Checkpoints, load_config, restore_parameters, save_parameters
from rlrag.mesh import make_mesh
from rlrag.model.architecture import NO_ADAPTER, Architecture
from rlrag.model.families import CONFIG, read_architecture
from rlrag.model.folder import KEPT, keep_description, locate
from rlrag.model.hf import load_parameters
from rlrag.model.hf_export import export_model
from rlrag.model.parameters import Transformer, abstract, merged, plain
from rlrag.model.peft import export_adapter
from rlrag.setup import OWN, load_policy

GENERATION = "generation_config.json"


def convert(
    source: str,
    to: Path,
    *,
    model: str = "policy",
    best: bool = False,
    dtype: str = "",
    shard_bytes: int = 5 * 10**9,
    adapter: str = "",
    peft: bool = False,
    base: str = "",
) -> str:
    """Write the folder `to`; what was written, in words.

    source: a run's directory or a folder of ours gives a folder for transformers; a Hugging Face folder or hub id one
    of ours. model, best: which parameters of a run, and whether the best by held-out score instead of the newest.
    dtype of the tensors; empty: as they are. shard_bytes: of a safetensors file at most. adapter: which of a run's, or
    "none" for the base alone; empty: the first of its names. peft: write the adapter alone, for the model `base`;
    empty: for the one that model.path names.

    Raises ValueError, with the remedy, for what cannot be read or written; `to` then is not there.
    """
    if to.exists():
        raise ValueError(f"{to} is there already: name a folder that is not, or remove it")
    if base and not peft:
        raise ValueError(f"--base={base} is the model that an adapter alone is written for: give --peft too")
    folder = Path(source)
    if (folder / "checkpoints").is_dir() or (folder / "best").is_dir():
        with written(to) as part:
            a, params = read_run(folder, model, best)
            adapter = chosen(a, adapter, source, peft)
            if peft:
                own = base or config.from_dict(load_config(folder)).model.path
                return f"{to}: {export_peft(params, a, adapter, part, folder, own, dtype)}"
            description = folder / KEPT
            whole = merged(params, a, adapter) if a != plain(a) else params
            export(whole, plain(a), part, description if description.is_dir() else None, dtype, shard_bytes)
            said = "a model for transformers" + (f", {adapter} merged into its base" if adapter else "")
            if not describe(folder, part):
                return f"{to}: {said}, without a tokenizer (its run has one of its own world)"
        return f"{to}: {said}"
    if adapter or peft:
        raise ValueError(f"{source} is no run, which --{'peft' if peft else 'adapter'} wants: name a --workdir")
    folder = locate(source)
    found = read_architecture(folder)
    if not isinstance(found, Architecture):
        raise ValueError(f"{source} is an encoder: decoders can be converted")
    if (folder / PARAMETERS).is_dir():
        with written(to) as part:
            own = replace(found, param_dtype=dtype or stored_dtype(folder))
            params = restore_parameters(folder, abstract(own, one_device()))
            export(params, own, part, folder, "", shard_bytes)
            describe(folder, part)
        return f"{to}: a model for transformers"
    with written(to) as part:
        own = replace(found, param_dtype=dtype or stored_dtype(folder))
        save_parameters(part, load_parameters(folder, own))
        keep_description(folder, part)
    return f"{to}: a model for --config.model.path"


def chosen(a: Architecture, adapter: str, source: str, peft: bool) -> str:
    """The adapter that a flag names, without one the first; empty: none. ValueError where there is no such adapter."""
    names = a.adapters.listed
    if peft and (not names or adapter == NO_ADAPTER):
        raise ValueError(
            f"{source} has no adapter{'' if not names else f' {adapter!r}, but {a.adapters.names}'}: --peft writes one"
        )
    if adapter == NO_ADAPTER:
        return ""
    if adapter and adapter not in names:
        raise ValueError(f"{source} has no adapter {adapter!r}, but {a.adapters.names if names else 'none'}")
    return adapter or (names[0] if names else "")


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


def export_peft(params: Transformer, a: Architecture, adapter: str, to: Path, run: Path, base: str, dtype: str) -> str:
    """Write an adapter alone for the model `base`, with the tokenizer; what was written, in words.

    Raises ValueError where the base is not, bit by bit, what the run's adapters were learned on.
    """
    why = unlike(merged(params, a), a, base)
    if why:
        raise ValueError(
            f"an adapter of {run} says the same on its own base alone, and {why}: merge it (without --peft), or write "
            "that base first by --adapter=none --to=BASE and then give --peft --base=BASE"
        )
    export_adapter(params, a, adapter, to, base=base, dtype=dtype)
    if (run / KEPT).is_dir():
        keep_description(run / KEPT, to)
        (to / CONFIG).unlink()  # of the model, not of the adapter
    describe(run, to)
    return f"the adapter {adapter} for peft, on {base}"


def unlike(params: Transformer, a: Architecture, base: str) -> str:
    """In what a published model differs from plain parameters; empty: in nothing."""
    if not base:
        return "it began from no published model"
    folder, own = locate(base), plain(a)
    if (folder / PARAMETERS).is_dir():
        return f"{base} has it in our form"
    found = read_architecture(folder)
    if found.vocab_size != own.vocab_size:
        return f"{base} has {found.vocab_size} rows of the vocabulary, the run {own.vocab_size}"
    shapes = asdict(own), asdict(found)
    told = next((name for name in shapes[1] if name not in OWN and shapes[0].get(name) != shapes[1][name]), "")
    if told or not isinstance(found, Architecture):
        return f"{base} has another {told}"
    theirs = load_policy(folder, replace(own, value_head=False), one_device())
    mine = params.replace(value_head=None)  # type: ignore[attr-defined]
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(theirs), strict=True):
        if not bool((leaf == other).all()):
            return f"{base} has another {jax.tree_util.keystr(path, simple=True, separator='.')}"
    return ""


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
    rows = shapes["adapters.rows"][0] if "adapters.rows" in shapes else 0
    adapters = replace(experiment.model.adapters, rows=rows)
    sizes = {"vocab_size": shapes["embed"][0], "value_head": "value_head" in shapes, "adapters": adapters}
    a = Architecture(**own | sizes)
    params = checkpoints.restore_params(step, abstract(a, one_device()), model)
    checkpoints.close()
    return a, params


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def stored_dtype(folder: Path) -> str:
    """What config.json says the tensors are; float32 where it says nothing we hold."""
    told = json.loads((folder / CONFIG).read_text())
    found = told.get("dtype") or told.get("torch_dtype")
    return found if found == "bfloat16" else "float32"
