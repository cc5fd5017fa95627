"""Writing a decoder as a folder that transformers loads: config.json and safetensors, what hf.py reads.

Tensors leave the devices one layer at a time; one file's worth of them is in memory.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlrag.model.architecture import Architecture
from rlrag.model.families import (
    ACTIVATIONS,
    CONFIG,
    FAMILIES,
    FIELDS,
    LAYER_TYPES,
    ROPE_KEYS,
    Family,
    parse,
    read_json,
)
from rlrag.model.hf import INDEX, WEIGHTS
from rlrag.model.parameters import Transformer

POSITIONS = 32_768  # max_position_embeddings where no source says: rotary models have no limit of their own


def export_model(
    params: Transformer,
    a: Architecture,
    folder: Path,
    *,
    source: Path | None = None,
    dtype: str = "",
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write config.json and the weights of a model into an empty folder; the files that were written.

    source: the folder the model came from, whose config.json is kept where it tells the same shape. dtype of the
    tensors; empty: the parameters' own. shard_bytes: of a file at most, and of memory. A value head is left out:
    transformers' models have none.

    Raises ValueError where no family of transformers computes the architecture.
    """
    kept = dtype or str(params.embed.dtype)
    config = find_config(a, source) | {"dtype": kept, "vocab_size": a.vocab_size}
    config.pop("torch_dtype", None)  # what transformers called it before
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    written, shards = [folder / CONFIG], list(cut(tensors(params, config["model_type"], kept), shard_bytes, folder))
    if len(shards) == 1:
        shards[0][0].rename(folder / WEIGHTS)
        return [*written, folder / WEIGHTS]
    weight_map: dict[str, str] = {}
    for number, (file, names, _) in enumerate(shards, 1):
        final = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(final)
        weight_map |= dict.fromkeys(names, final.name)
        written.append(final)
    index = {"metadata": {"total_size": sum(size for _, _, size in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*written, folder / INDEX]


def tensors(params: Transformer, kind: str, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in a checkpoint of a whole model, layer by layer."""
    family = FAMILIES[kind]

    def value(leaf: jax.Array, turned: bool) -> np.ndarray:
        found = np.asarray(jax.device_get(leaf.astype(jnp.dtype(dtype))))
        return np.ascontiguousarray(found.T if turned else found)

    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    named = {place: name for place, name in family.names.items() if place in leaves}
    for place, name in named.items():
        if "{}" not in name.template:
            inside = name.template.startswith(family.rooms)
            yield (family.prefix if inside else "") + name.template, value(leaves[place], name.turned)
    for layer in range(params.layers.attention_norm.shape[0]):
        for place, name in named.items():
            if "{}" in name.template:
                yield family.prefix + name.template.format(layer), value(leaves[place][layer], name.turned)


def cut(
    found: Iterator[tuple[str, np.ndarray]], shard_bytes: int, folder: Path
) -> Iterator[tuple[Path, Sequence[str], int]]:
    """Save tensors in files of at most so many bytes (a larger tensor has one of its own): file, names, bytes."""
    batch: dict[str, np.ndarray] = {}
    size = count = 0

    def save() -> tuple[Path, Sequence[str], int]:
        file = folder / f"part-{count}.safetensors"
        save_file(batch, file, metadata={"format": "pt"})
        return file, list(batch), size

    for name, tensor in found:
        if batch and size + tensor.nbytes > shard_bytes:
            yield save()
            batch, size, count = {}, 0, count + 1
        batch[name] = tensor
        size += tensor.nbytes
    yield save()


def find_config(a: Architecture, source: Path | None) -> dict[str, Any]:
    """The config.json of the folder a model came from, where it tells this shape (the vocabulary may have grown); else
    that of the first family that computes the same."""
    if source is not None and (source / CONFIG).is_file():
        config = read_json(source / CONFIG)
        if not differences(a, config):
            return config
    nearest: Sequence[str] = ()
    for kind, family in FAMILIES.items():
        if family.architecture is Architecture:
            config = write_config(a, kind, family)
            different = differences(a, config)
            if not different:
                return config
            nearest = min(nearest or different, different, key=len)
    values = ", ".join(f"{name} {getattr(a, name)!r}" for name in nearest)
    raise ValueError(
        f"transformers has no family that computes this model ({values}): one that was trained from a Hugging Face "
        "folder (--config.model.path) can be written"
    )


def differences(a: Architecture, config: dict[str, Any]) -> list[str]:
    """Fields in which the computation that a config.json tells is another."""
    plain = replace(a, dtype="float32", param_dtype="float32", remat="", scan_unroll=1, value_head=False)
    found = asdict(parse(Path(CONFIG), config | {"vocab_size": a.vocab_size}))
    return [name for name, value in asdict(plain).items() if found.get(name) != value]


def write_config(a: Architecture, kind: str, family: Family) -> dict[str, Any]:
    """The architecture as well as a family can say it."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    stretched = a.rope_scaling or "default"
    rope: dict[str, Any] = {"rope_type": stretched, "rope_theta": a.rope_theta}
    rope |= {key: getattr(a, field) for field, key in ROPE_KEYS[stretched].items()}
    if family.defaults["rope_local_base_freq"] is not None:
        local = {"rope_type": "default", "rope_theta": a.local_rope_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = {
        "architectures": [family.causal],
        "model_type": kind,
        **{key: getattr(a, field) for field, key in family.sizes.items()},
        **{key: getattr(a, FIELDS[key]) for key in family.defaults if key in FIELDS},
        **{key: activations[a.activation] for key in ("hidden_act", "hidden_activation") if key in family.defaults},
        "rope_parameters": rope,
        "max_position_embeddings": POSITIONS,
    }
    if "attention_scale" in family.options:
        config["query_pre_attn_scalar"] = round(a.attention_scale**-2) if a.attention_scale else a.head_dim
    if family.defaults["sliding_window"] is not None:
        config |= {"sliding_window": a.window or None, "use_sliding_window": bool(a.window)}
    if family.defaults["max_window_layers"] or family.defaults["sliding_window_pattern"]:
        names = {letter: name for name, letter in LAYER_TYPES.items()}
        config["layer_types"] = [names["L" if local else "G"] for local in a.local]
    return config
