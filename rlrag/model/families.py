"""Families of models as Hugging Face publishes them, as data: what config.json says, and what tensors are called.

A family is a row of FAMILIES. Decoders differ in a few values and names, and share every rule by which config.json is
read: rotary positions, windows, activation. A new family of that shape is one more row. Imports no JAX.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlrag.model.architecture import Architecture, EncoderArchitecture

CONFIG = "config.json"
Config = Mapping[str, Any]


class Name(NamedTuple):
    """What a leaf is called in a checkpoint; {} stands for the layer. turned: stored [out, in], wanted [in, out]."""

    template: str
    turned: bool = False


class Family(NamedTuple):
    """One model_type of config.json.

    sizes: field of the architecture -> key of config.json that must be there.
    defaults: keys that may be absent, with the value that transformers then takes.
    only: keys whose other values ask for something that our models do not compute.
    options: fields of the architecture that the family fixes, or computes from config.json.
    names: leaf -> its name. prefix: what checkpoints of a whole model, not its trunk alone, put before the names.
    rooms: how the names of the trunk's tensors begin; one that no leaf reads is an error, outside it is passed over.
    causal: the class of transformers that samples; empty: there is none.
    """

    architecture: type[Architecture] | type[EncoderArchitecture]
    sizes: Mapping[str, str]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, Name]
    prefix: str
    rooms: tuple[str, ...]
    options: Mapping[str, Any | Callable[[Config], Any]] = {}
    causal: str = ""


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
    causal: str,
    options: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    only: Mapping[str, tuple[Any, ...]] | None = None,
    names: Mapping[str, Name] | None = None,
) -> Family:
    """A family of the Llama shape, with what sets it apart."""
    return Family(
        architecture=Architecture,
        sizes=SIZES,
        defaults={
            "num_key_value_heads": None,  # every head has its own
            "head_dim": None,  # embed_dim / num_heads
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_theta": 10_000.0,
            "rope_local_base_freq": None,  # of local layers; None: as of the others
            # Layer i is local where all of these say so.
            "use_sliding_window": True,
            "sliding_window": None,
            "max_window_layers": 0,  # i is at least this
            "sliding_window_pattern": 0,  # i + 1 is no multiple of this
            **({} if defaults and "hidden_activation" in defaults else {"hidden_act": "silu"}),
            **(defaults or {}),
        },
        only={"quantization_config": (), "attention_bias": (False,), "partial_rotary_factor": (1.0,), **(only or {})},
        names={**DECODER_NAMES, **(names or {})},
        prefix="model.",
        rooms=("embed_tokens.", "layers.", "norm."),
        options=options or {},
        causal=causal,
    )


QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

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
    # Llama 2 and 3, SmolLM2.
    "llama": _decoder("LlamaForCausalLM", only={"mlp_bias": (False,)}),
    "mistral": _decoder("MistralForCausalLM", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _decoder("Qwen2ForCausalLM", {"qkv_bias": True}, {"num_key_value_heads": 32, **QWEN_WINDOWS}),
    "qwen3": _decoder(
        "Qwen3ForCausalLM", {"qk_norm": True}, {"num_key_value_heads": 32, "head_dim": 128, **QWEN_WINDOWS}
    ),
    "gemma3_text": _decoder(
        "Gemma3ForCausalLM",
        options={
            "qk_norm": True,
            "norm_offset": 1.0,
            "post_norms": True,
            "embed_scale": lambda config: config["hidden_size"] ** 0.5,
            "attention_scale": lambda config: config.get("query_pre_attn_scalar", 256) ** -0.5,
        },
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        only={
            "attn_logit_softcapping": (),
            "final_logit_softcapping": (),
            "use_bidirectional_attention": (False,),
        },
        names={
            "layers.post_attention_norm": Name("layers.{}.post_attention_layernorm.weight"),
            "layers.mlp_norm": Name("layers.{}.pre_feedforward_layernorm.weight"),
            "layers.post_mlp_norm": Name("layers.{}.post_feedforward_layernorm.weight"),
        },
    ),
}

# Where a key of `defaults` goes, where it goes as it is.
FIELDS = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_types",
    "layer_norm_eps": "norm_epsilon",
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # in config.json -> in an Architecture
LAYER_TYPES = {"full_attention": "G", "sliding_attention": "L"}
# Of rope_parameters where rope_type is llama3.
LLAMA3 = {
    "rope_factor": "factor",
    "rope_low": "low_freq_factor",
    "rope_high": "high_freq_factor",
    "rope_positions": "original_max_position_embeddings",
}
ROPE_KEYS = {"default": {}, "linear": {"rope_factor": "factor"}, "llama3": LLAMA3}


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


def read_family(folder: str | Path) -> Family:
    file = Path(folder) / CONFIG
    return _family(file, read_json(file))


def read_architecture(
    folder: str | Path, *, dtype: str = "float32", param_dtype: str = "float32"
) -> Architecture | EncoderArchitecture:
    """The shape that config.json tells; dtype of activations, param_dtype of the parameters once loaded.

    Raises ValueError for a model_type that is no row of FAMILIES and for values that our models do not compute.
    """
    file = Path(folder) / CONFIG
    return replace(parse(file, read_json(file)), dtype=dtype, param_dtype=param_dtype)


def parse(file: Path, config: Config) -> Architecture | EncoderArchitecture:
    """The shape that a config.json tells; `file` is named in errors."""
    family = _family(file, config)
    sizes: dict[str, Any] = {field: config.get(key) for field, key in family.sizes.items()}
    for field, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{file}: {family.sizes[field]} is {size!r}: give a whole number")
    for key, allowed in family.only.items():
        if config.get(key) is not None and config[key] not in allowed:
            wanted = f"only {' or '.join(map(repr, allowed))} is computed" if allowed else "this is not computed"
            raise ValueError(f"{file}: {key} is {config[key]!r}: {wanted} for a {config['model_type']} model here")
    told = {**family.defaults, **config}
    others = {FIELDS[key]: told[key] for key in family.defaults if key in FIELDS}
    if family.architecture is Architecture:
        others |= _rope(file, config, told) | _windows(file, config, told) | _activation(file, family, told)
        others["num_kv_heads"] = others["num_kv_heads"] or sizes["num_heads"]
        others["head_dim"] = others["head_dim"] or sizes["embed_dim"] // max(sizes["num_heads"], 1)
    fixed: dict[str, Any] = {
        name: value(config) if callable(value) else value for name, value in family.options.items()
    }
    architecture = family.architecture(**sizes, **others, **fixed)
    try:
        architecture.check()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return architecture


def _family(file: Path, config: Config) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type is {kind!r}: models of {', '.join(sorted(FAMILIES))} can be read")
    return FAMILIES[kind]


def _activation(file: Path, family: Family, told: Config) -> dict[str, Any]:
    key = next(key for key in ("hidden_act", "hidden_activation") if key in family.defaults)
    if told[key] not in ACTIVATIONS:
        raise ValueError(f"{file}: {key} is {told[key]!r}: only {' or '.join(ACTIVATIONS)} is computed here")
    return {"activation": ACTIVATIONS[told[key]]}


def _rope(file: Path, config: Config, told: Config) -> dict[str, Any]:
    """The rotary frequencies: from rope_parameters (transformers 5), for all layers or for each kind of them, or from
    rope_theta, rope_scaling and rope_local_base_freq (before)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = "full_attention" in given or "sliding_attention" in given
    rope = (given.get("full_attention") or {}) if by_kind else given
    local = (given.get("sliding_attention") or {}) if by_kind else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for where, found, allowed in (
        ("", kind, tuple(ROPE_KEYS)),
        (" of local layers", local.get("rope_type", "default"), ("default",)),
    ):
        if found not in allowed:
            raise ValueError(
                f"{file}: the rotary positions{where} are scaled ({found!r}): {', '.join(allowed)} is computed here"
            )
    missing = [key for key in ROPE_KEYS[kind].values() if rope.get(key) is None]
    if missing:
        raise ValueError(f"{file}: rotary positions of the type {kind!r} need {', '.join(missing)}: fetch it again")
    read: dict[str, Any] = {field: rope[key] for field, key in ROPE_KEYS[kind].items()}
    theta, local_theta = rope.get("rope_theta") or told["rope_theta"], local.get("rope_theta")
    return read | {
        "rope_scaling": "" if kind == "default" else kind,
        "rope_theta": float(theta),
        "local_rope_theta": float(local_theta or told["rope_local_base_freq"] or 0),
    }


def _windows(file: Path, config: Config, told: Config) -> dict[str, Any]:
    """Which layers are local, and how far they see."""
    layers, window = told["num_hidden_layers"], told["sliding_window"] if told["use_sliding_window"] else None
    kinds = config.get("layer_types")
    if kinds is None:
        every = told["sliding_window_pattern"]
        local = [i >= told["max_window_layers"] and not (every and (i + 1) % every == 0) for i in range(layers)]
        kinds = ["sliding_attention" if yes else "full_attention" for yes in local]
    if len(kinds) != layers or set(kinds) - LAYER_TYPES.keys():
        raise ValueError(
            f"{file}: layer_types has {len(kinds)} entries of {', '.join(sorted(set(kinds)))}: "
            f"{layers} of {' or '.join(LAYER_TYPES)} are computed here"
        )
    letters = "".join(LAYER_TYPES[kind] for kind in kinds) if window else "G"
    return {"pattern": _period(letters), "window": window if window and "L" in letters else 0}


def _period(letters: str) -> str:
    """The shortest pattern that, repeated, gives the letters."""
    return next(
        letters[:size]
        for size in range(1, len(letters) + 1)
        if (letters[:size] * len(letters))[: len(letters)] == letters
    )
