"""Models in the layout of Hugging Face: config.json gives the shape, safetensors the parameters, read by name.

A family is a row of FAMILIES: which configuration values it may have, and what its tensors are called. A new family of
decoders of the Llama shape is one more row. Tensors are read, turned and placed leaf by leaf, so that no second copy of
the model is in memory; no torch, and no file that can run code (pickle) is opened.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from rlrag.mesh import sharding
from rlrag.model import bert, parameters
from rlrag.model.architecture import Architecture, EncoderArchitecture
from rlrag.model.parameters import Leaf, Transformer, is_leaf

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Name(NamedTuple):
    """What a leaf is called in a checkpoint; {} stands for the layer. turned: stored [out, in], wanted [in, out]."""

    template: str
    turned: bool = False


class Family(NamedTuple):
    """One model_type of config.json.

    sizes: field of the architecture -> key of config.json that must be there.
    defaults: keys that may be absent, with the value that transformers then takes.
    only: keys whose other values ask for something that our models do not compute.
    options: fields of the architecture that the family fixes.
    names: leaf -> its name. prefix: what checkpoints of a whole model, not its trunk alone, put before the names.
    rooms: how the names of the trunk's tensors begin; one that no leaf reads is an error, outside it is passed over.
    """

    architecture: type[Architecture] | type[EncoderArchitecture]
    sizes: Mapping[str, str]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, Name]
    prefix: str
    rooms: tuple[str, ...]
    options: Mapping[str, Any] = {}


SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}

DECODER_NAMES = {
    "embed": Name("embed_tokens.weight"),
    "layers.attention_norm": Name("layers.{}.input_layernorm.weight"),
    "layers.query": Name("layers.{}.self_attn.q_proj.weight", turned=True),
    "layers.key": Name("layers.{}.self_attn.k_proj.weight", turned=True),
    "layers.value": Name("layers.{}.self_attn.v_proj.weight", turned=True),
    "layers.query_bias": Name("layers.{}.self_attn.q_proj.bias"),
    "layers.key_bias": Name("layers.{}.self_attn.k_proj.bias"),
    "layers.value_bias": Name("layers.{}.self_attn.v_proj.bias"),
    "layers.query_norm": Name("layers.{}.self_attn.q_norm.weight"),
    "layers.key_norm": Name("layers.{}.self_attn.k_norm.weight"),
    "layers.output": Name("layers.{}.self_attn.o_proj.weight", turned=True),
    "layers.mlp_norm": Name("layers.{}.post_attention_layernorm.weight"),
    "layers.gate": Name("layers.{}.mlp.gate_proj.weight", turned=True),
    "layers.up": Name("layers.{}.mlp.up_proj.weight", turned=True),
    "layers.down": Name("layers.{}.mlp.down_proj.weight", turned=True),
    "final_norm": Name("norm.weight"),
    "head": Name("lm_head.weight"),
}

BERT_NAMES = {
    "word": Name("embeddings.word_embeddings.weight"),
    "position": Name("embeddings.position_embeddings.weight"),
    "token_type": Name("embeddings.token_type_embeddings.weight"),
    "embed_norm": Name("embeddings.LayerNorm.weight"),
    "embed_norm_bias": Name("embeddings.LayerNorm.bias"),
    "layers.query": Name("encoder.layer.{}.attention.self.query.weight", turned=True),
    "layers.key": Name("encoder.layer.{}.attention.self.key.weight", turned=True),
    "layers.value": Name("encoder.layer.{}.attention.self.value.weight", turned=True),
    "layers.query_bias": Name("encoder.layer.{}.attention.self.query.bias"),
    "layers.key_bias": Name("encoder.layer.{}.attention.self.key.bias"),
    "layers.value_bias": Name("encoder.layer.{}.attention.self.value.bias"),
    "layers.output": Name("encoder.layer.{}.attention.output.dense.weight", turned=True),
    "layers.output_bias": Name("encoder.layer.{}.attention.output.dense.bias"),
    "layers.attention_norm": Name("encoder.layer.{}.attention.output.LayerNorm.weight"),
    "layers.attention_norm_bias": Name("encoder.layer.{}.attention.output.LayerNorm.bias"),
    "layers.up": Name("encoder.layer.{}.intermediate.dense.weight", turned=True),
    "layers.up_bias": Name("encoder.layer.{}.intermediate.dense.bias"),
    "layers.down": Name("encoder.layer.{}.output.dense.weight", turned=True),
    "layers.down_bias": Name("encoder.layer.{}.output.dense.bias"),
    "layers.mlp_norm": Name("encoder.layer.{}.output.LayerNorm.weight"),
    "layers.mlp_norm_bias": Name("encoder.layer.{}.output.LayerNorm.bias"),
}


def _decoder(
    options: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    only: Mapping[str, tuple[Any, ...]] | None = None,
) -> Family:
    """A family of the Llama shape, with what sets it apart."""
    return Family(
        architecture=Architecture,
        sizes=SIZES,
        # head_dim null: embed_dim / num_heads. num_key_value_heads null: every head has its own.
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            **(defaults or {}),
        },
        only={"hidden_act": ("silu",), "quantization_config": (), **(only or {})},
        names=DECODER_NAMES,
        prefix="model.",
        rooms=("embed_tokens.", "layers.", "norm."),
        options=options or {},
    )


FAMILIES = {
    "bert": Family(
        architecture=EncoderArchitecture,
        sizes=SIZES,
        defaults={"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
        only={
            "hidden_act": ("gelu",),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (),
        },
        names=BERT_NAMES,
        prefix="bert.",
        rooms=("embeddings.", "encoder."),
    ),
    "llama": _decoder(only={"attention_bias": (False,), "mlp_bias": (False,)}),
    "qwen2": _decoder({"qkv_bias": True}, {"num_key_value_heads": 32}, {"use_sliding_window": (False,)}),
    "qwen3": _decoder(
        {"qk_norm": True},
        {"num_key_value_heads": 32, "head_dim": 128},
        {"use_sliding_window": (False,), "attention_bias": (False,)},
    ),
}

# Where a key of `defaults` goes.
FIELDS = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_types",
    "layer_norm_eps": "norm_epsilon",
}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file is not there or holds anything else."""
    if not file.is_file():
        raise ValueError(f"there is no {file.name} in {file.parent}: give the folder of a Hugging Face model")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}, not an object: fetch it again")
    return found


def read_architecture(
    folder: str | Path, *, dtype: str = "float32", param_dtype: str = "float32"
) -> Architecture | EncoderArchitecture:
    """The shape that config.json tells; dtype of activations, param_dtype of the parameters once loaded.

    Raises ValueError for a model_type that is no row of FAMILIES and for values that our models do not compute.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    family = _family(file, config)
    sizes: dict[str, Any] = {field: config.get(key) for field, key in family.sizes.items()}
    for field, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{file}: {family.sizes[field]} is {size!r}: give a whole number")
    for key, allowed in family.only.items():
        if config.get(key) is not None and config[key] not in allowed:
            wanted = f"only {' or '.join(map(repr, allowed))} is computed" if allowed else "this is not read"
            raise ValueError(f"{file}: {key} is {config[key]!r}: {wanted} for a {config['model_type']} model here")
    others = {FIELDS[key]: config.get(key, default) for key, default in family.defaults.items()}
    if family.architecture is Architecture:
        others["rope_theta"] = _rope_theta(file, config)
        others["num_kv_heads"] = others["num_kv_heads"] or sizes["num_heads"]
        others["head_dim"] = others["head_dim"] or sizes["embed_dim"] // max(sizes["num_heads"], 1)
        kinds = set(config.get("layer_types") or ())
        if kinds - {"full_attention"}:
            raise ValueError(f"{file}: layer_types has {sorted(kinds)}: only 'full_attention' is computed here")
    known = {field.name for field in fields(family.architecture)}
    given = {"dtype": dtype, "param_dtype": param_dtype, **sizes, **others, **family.options}
    architecture = family.architecture(**{field: value for field, value in given.items() if field in known})
    try:
        architecture.check()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return architecture


def _family(file: Path, config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type is {kind!r}: models of {', '.join(sorted(FAMILIES))} can be read")
    return FAMILIES[kind]


def _rope_theta(file: Path, config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, from rope_parameters (transformers 5) or rope_theta (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: the rotary positions are scaled ({kind!r}): only 'default' is computed here")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return 10_000.0 if theta is None else float(theta)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model, in a fixed order: one, or the shards that the index names."""
    return sorted({file for file in _tensor_files(Path(folder)).values()})


def load_parameters(
    folder: str | Path, architecture: Architecture | EncoderArchitecture, *, mesh: Mesh | None = None
) -> Transformer | bert.Bert:
    """The parameters of a model in `architecture.param_dtype`, laid over `mesh` (None: on the default device).

    architecture is what `read_architecture` gave, or differs from it in dtypes, remat, `tied` (True: a head of its own
    is left unread) and the value head, which starts as it does in a new model.

    Raises ValueError, naming the tensor, where one is missing, has another shape than config.json tells or is
    quantised, and where the trunk holds one that the architecture does not read.
    """
    folder = Path(folder)
    family = _family(folder / CONFIG, read_json(folder / CONFIG))
    description: Any = (
        bert.describe(architecture)
        if isinstance(architecture, EncoderArchitecture)
        else parameters.describe(architecture)
    )
    leaves, tree = jax.tree_util.tree_flatten_with_path(description, is_leaf=is_leaf)
    dtype = jnp.dtype(architecture.param_dtype)
    with _Checkpoint(folder, family.prefix) as checkpoint:
        values = []
        for path, leaf in leaves:
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            value = _read_leaf(checkpoint, family.names.get(place), place, leaf, dtype)
            where = None if mesh is None else sharding(mesh, leaf.axes, leaf.shape)
            values.append(jnp.asarray(value) if where is None else jax.device_put(value, where))
        for name in checkpoint.unread():
            if name.startswith(family.rooms) and not name.endswith(("position_ids", "rotary_emb.inv_freq")):
                raise ValueError(
                    f"{folder}: the tensor {name!r} is not part of the model that config.json tells: "
                    "fetch both from the same place"
                )
    return jax.tree.unflatten(tree, values)


def _read_leaf(checkpoint: "_Checkpoint", name: Name | None, place: str, leaf: Leaf, dtype: Any) -> np.ndarray:
    """One leaf, its layers read one after the other into their places."""
    if name is None:
        assert leaf.stddev == 0, f"{place} has no name and no fixed initial value"
        return np.full(leaf.shape, leaf.mean, dtype)
    stacked = "{}" in name.template
    value = np.empty(leaf.shape, dtype)
    shape = leaf.shape[1:] if stacked else leaf.shape
    for layer in range(leaf.shape[0] if stacked else 1):
        tensor = checkpoint.read(name.template.format(layer), shape[::-1] if name.turned else shape)
        value[layer if stacked else ...] = tensor.T if name.turned else tensor
    return value


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Where every tensor lies. Raises ValueError where there are no safetensors or a shard is missing."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ValueError(
            f"there is no {WEIGHTS} and no {INDEX} in {folder}: save the model as safetensors "
            "(save_pretrained of transformers does)"
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files: fetch it again")
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"{index} names the shard {shard!r}, which is not in {folder}: fetch it too")
    return {name: folder / shard for name, shard in table.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): fetch it again") from None


class _Checkpoint:
    """The tensors of a folder by their names without the prefix; knows which were read."""

    def __init__(self, folder: Path, prefix: str):
        self._folder, self._prefix = folder, prefix
        self._files = _tensor_files(folder)
        self._handles: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._read: set[str] = set()

    def __enter__(self) -> "_Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = next((each for each in self._spellings(name) if each in self._files), None)
        if found is None:
            raise ValueError(
                f"{self._folder}: the tensor {name!r} is missing, with and without {self._prefix!r} before it: "
                "fetch the checkpoint again"
            )
        file = self._files[found]
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(_opened(file))
        try:
            tensor = self._handles[file].get_tensor(found)
        except SafetensorError as error:
            raise ValueError(f"{file}: the tensor {found!r} cannot be read ({error}): fetch the file again") from None
        if tensor.shape != shape:
            raise ValueError(
                f"{file}: the tensor {found!r} has the shape {list(tensor.shape)}, config.json asks for {list(shape)}: "
                "fetch both from the same place"
            )
        if tensor.dtype.name not in FLOATS:
            raise ValueError(f"{file}: the tensor {found!r} is {tensor.dtype.name}: give one of {', '.join(FLOATS)}")
        self._read.add(found)
        return tensor

    def unread(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in sorted(self._files.keys() - self._read))

    def _spellings(self, name: str) -> Iterator[str]:
        """With and without the prefix; norms of the first BERT checkpoints have a gamma and a beta."""
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for each in dict.fromkeys((name, old)):
            yield from (each, self._prefix + each)
