"""Adapters as the library peft keeps them: adapter_config.json and adapter_model.safetensors, written and read.

peft adds lora_alpha / r * lora_B lora_A to a matrix stored [out, in]; ours is alpha / rank * down up, of [in, out]. Of
newest rows of the vocabulary peft keeps what they have become, and ours is what was added to them: what was written
here is read to the same rows, bit by bit, and others within a rounding.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlrag.model.adapters import Adaptation, LowRank
from rlrag.model.architecture import TARGETS, Architecture
from rlrag.model.families import DECODER_NAMES
from rlrag.model.parameters import Transformer, describe, plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE, TRUNK = "base_model.model.", "base_model.model.model."  # before the names of a whole model, of its trunk
# The matrices are called alike in every family of decoders: layers.{}.self_attn.q_proj.
MODULES = {target: DECODER_NAMES[f"layers.{target}"].template.removesuffix(".weight") for target in TARGETS}
EMBED, HEAD = "embed_tokens", "lm_head"
ROWS = {name: f"{room}{name}.token_adapter.trainable_tokens_delta" for name, room in ((EMBED, TRUNK), (HEAD, WHOLE))}
# Settings whose other values ask for an addition that is not computed here.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "modules_to_save": ([],), "rank_pattern": ({},), "alpha_pattern": ({},), "layer_replication": ([],),
    "alora_invocation_tokens": ([],), "use_qalora": (False,), "use_bdlora": (False,), "kasa_config": ({},),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base as well
}  # fmt: skip


# -- written ----------------------------------------------------------------------------------------------------------


def export_adapter(
    params: Transformer, a: Architecture, adapter: str, folder: Path, *, base: str, dtype: str = ""
) -> list[Path]:
    """Write one adapter of a model into a folder; the files that were written.

    base: where peft finds the model that it is added to. dtype of the tensors; empty: float32, as they learn.
    """
    kept = jnp.dtype(dtype or "float32")
    found = {name: np.ascontiguousarray(tensor.astype(kept)) for name, tensor in tensors(params, a, adapter)}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings(a, base), indent=2) + "\n")
    return [folder / CONFIG, folder / WEIGHTS]


def settings(a: Architecture, base: str) -> dict[str, Any]:
    """What adapter_config.json says; what it does not say peft has defaults for."""
    own = a.adapters
    newest = list(range(a.vocab_size - own.rows, a.vocab_size))
    tables = (EMBED,) if a.tied else (EMBED, HEAD)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": own.rank,
        "lora_alpha": int(own.alpha) if own.alpha == int(own.alpha) else own.alpha,
        "lora_dropout": own.dropout,
        "target_modules": [MODULES[target].rpartition(".")[2] for target in own.chosen],
        "trainable_token_indices": dict.fromkeys(tables, newest) if newest else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def tensors(params: Transformer, a: Architecture, adapter: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of an adapter by the name that peft gives it."""
    assert params.adapters is not None
    own, number = params.adapters, a.adapters.number(adapter)
    for target, low in own.layers.items():
        down, up = (np.asarray(jax.device_get(part)) for part in (low.down[:, :, number], low.up[:, number]))
        for layer in range(a.num_layers):
            module = TRUNK + MODULES[target].format(layer)
            yield f"{module}.lora_A.weight", down[layer].T
            yield f"{module}.lora_B.weight", up[layer].T
    for name, table, rows in ((EMBED, params.embed, own.rows), (HEAD, params.head, own.head_rows)):
        if rows is not None and table is not None:
            yield ROWS[name], np.asarray(jax.device_get(table[-rows.shape[0] :].astype(jnp.float32) + rows))


# -- read -------------------------------------------------------------------------------------------------------------


def read_adapters(a: Architecture) -> list[Adaptation | None]:
    """What stands in the folders of `adapters.path`, as `begun` takes it; None for an adapter that is new.

    Raises ValueError, naming the flag or the remedy, where a folder does not fit the architecture.
    """
    folders = [Path(folder).expanduser() if folder else None for folder in a.adapters.path.split(",")]
    found = [folder and read_adapter(folder, a) for folder in folders]
    rows = [np.asarray(one.rows) for one in found if one is not None and one.rows is not None]
    if not all(np.array_equal(one, rows[0]) for one in rows):
        raise ValueError(
            f"model.adapters.path is {a.adapters.path!r}, whose folders differ in rows of the vocabulary, which all "
            "adapters share: give those of one training"
        )
    return found


def begun(params: Transformer, found: Sequence[Adaptation | None]) -> Transformer:
    """The parameters with adapters that begin as they were read."""
    own = params.adapters
    assert own is not None
    layers, rows, head_rows = dict(own.layers), own.rows, own.head_rows
    for number, one in enumerate(found):
        for name, low in one.layers.items() if one else ():
            down = layers[name].down.at[:, :, number].set(low.down)
            layers[name] = LowRank(down, layers[name].up.at[:, number].set(low.up))
        if one and one.rows is not None:
            rows = one.rows - params.embed[-len(one.rows) :].astype(jnp.float32)
        if one and one.head_rows is not None:
            assert params.head is not None
            head_rows = one.head_rows - params.head[-len(one.head_rows) :].astype(jnp.float32)
    return params.replace(adapters=Adaptation(layers, rows, head_rows))  # type: ignore[attr-defined]


def read_adapter(folder: Path, a: Architecture) -> Adaptation:
    """One adapter: down [L, in, r] and up [L, r, out] of every target, and what the newest rows have become."""
    told = _settings(folder)
    found = _tensors(folder)
    _fit(folder, told, found, a)
    layers = {target: _low(folder, found, target, a) for target in a.adapters.chosen}
    rows = _rows(folder, told, found, a)
    if found:
        raise ValueError(
            f"{folder / WEIGHTS} holds {min(found)!r}, which is not computed here: merge it into its base with peft's "
            "merge_and_unload"
        )
    return Adaptation(layers, rows.get(EMBED), rows.get(HEAD))  # type: ignore[arg-type]


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"there is no {CONFIG} in {folder}: give a folder that peft's save_pretrained wrote")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): save the adapter again") from None
    for key, allowed in ONLY.items():
        value = told.get(key)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{file}: {key} is {value!r}: only {allowed[0]!r} is computed here; merge it into its base with peft's "
                "merge_and_unload"
            )
    return told


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"there is no {WEIGHTS} in {folder}: save the adapter with safe_serialization=True")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): save the adapter again") from None


def _fit(folder: Path, told: Mapping[str, Any], found: Mapping[str, Any], a: Architecture) -> None:
    """Raise ValueError, with the flag that mends it, where rank, scale or targets are not the architecture's."""
    own, rank = a.adapters, told.get("r", 8)
    if rank != own.rank:
        raise _unlike(folder, "rank", own.rank, f"r {rank}", rank)
    # rslora divides by the square root of the rank.
    alpha = told.get("lora_alpha", 8) * (rank**0.5 if told.get("use_rslora") else 1)
    if not math.isclose(alpha, own.alpha):
        raise _unlike(folder, "alpha", own.alpha, f"lora_alpha {alpha}", alpha)
    names = {re.sub(r"\.\d+\.", ".{}.", name.removeprefix(TRUNK), count=1) for name in found if ".lora_A." in name}
    there = [target for target in TARGETS if f"{MODULES[target]}.lora_A.weight" in names]
    if set(there) != set(own.chosen):
        raise _unlike(folder, "targets", own.targets, "those of " + ",".join(there), ",".join(there))


def _unlike(folder: Path, field: str, own: Any, theirs: str, wanted: Any) -> ValueError:
    return ValueError(
        f"model.adapters.{field} is {own}, but {folder} has {theirs}: give --config.model.adapters.{field}={wanted}"
    )


def _low(folder: Path, found: dict[str, np.ndarray], target: str, a: Architecture) -> LowRank:
    """The layers of one target, which are taken out of `found`."""
    downs, ups = [], []
    for layer in range(a.num_layers):
        for part, into in (("lora_A", downs), ("lora_B", ups)):
            name = f"{TRUNK}{MODULES[target].format(layer)}.{part}.weight"
            if name not in found:
                raise ValueError(f"{folder / WEIGHTS} lacks {name!r}: an adapter of every layer can be read here")
            into.append(found.pop(name).astype(np.float32).T)
    _, inside, outside = getattr(describe(plain(a)).layers, target).shape
    wanted = (inside, a.adapters.rank), (a.adapters.rank, outside)
    for tensor, shape in zip((*downs, *ups), [wanted[0]] * len(downs) + [wanted[1]] * len(ups), strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{folder / WEIGHTS}: an addition to {target} has the shape {tensor.shape[::-1]}, the model asks for "
                f"{shape[::-1]}: name the model it was trained on by --config.model.path"
            )
    return LowRank(np.stack(downs), np.stack(ups))  # type: ignore[arg-type]


def _rows(
    folder: Path, told: Mapping[str, Any], found: dict[str, np.ndarray], a: Architecture
) -> dict[str, np.ndarray]:
    """What the newest rows of embedding and head have become, taken out of `found`; empty where none has learned."""
    given = told.get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {EMBED: given}
    rows = {}
    for table in (EMBED,) if a.tied else (EMBED, HEAD):
        tokens = given.get(table)
        if not tokens or ROWS[table] not in found:
            continue
        if sorted(tokens) != list(range(a.vocab_size - a.adapters.rows, a.vocab_size)):
            newest = sorted(tokens) == list(range(a.vocab_size - len(tokens), a.vocab_size))
            remedy = (
                f"give --config.model.adapters.rows={len(tokens)}"
                if newest
                else "merge it into its base with peft's merge_and_unload"
            )
            raise ValueError(
                f"model.adapters.rows is {a.adapters.rows}, but in {folder} rows {min(tokens)} to {max(tokens)} of a "
                f"vocabulary of {a.vocab_size} have learned: {remedy}"
            )
        rows[table] = found.pop(ROWS[table])[np.argsort(tokens)].astype(np.float32)
    return rows
