"""What config.json of every family says, and what it may not say."""

import json

import pytest

from rlrag.model.architecture import Architecture
from rlrag.model.families import read_architecture
from rlrag.model.parameters import num_parameters
from tests import decoders
from tests.encoders import FIXTURES

SHARDS = FIXTURES / "qwen2-shards"


def copied(folder, tmp_path, **config):
    """config.json of a checkpoint with other values; ... takes one away."""
    copy = tmp_path / "copy"
    copy.mkdir()
    changed = json.loads((folder / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    return copy


def test_shapes_of_each_family():
    a = read_architecture(FIXTURES / "Qwen3-Embedding-tiny", dtype="bfloat16")
    assert isinstance(a, Architecture)
    assert (a.qk_norm, a.qkv_bias, a.head_dim, a.num_kv_heads, a.norm_epsilon) == (True, False, 6, 2, 1e-5)
    assert (a.dtype, a.param_dtype) == ("bfloat16", "float32")
    a = read_architecture(SHARDS)
    assert isinstance(a, Architecture)
    assert (a.qk_norm, a.qkv_bias, a.head_dim, a.rope_theta, a.tied) == (False, True, 4, 1e6, False)


def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path):
    old = {"rope_parameters": ..., "rope_theta": 5e5, "num_key_value_heads": ..., "head_dim": ..., "rms_norm_eps": ...}
    a = read_architecture(copied(FIXTURES / "llama-mean", tmp_path, **old))
    assert isinstance(a, Architecture)
    assert (a.rope_theta, a.num_kv_heads, a.head_dim, a.norm_epsilon, a.tied) == (5e5, 2, 4, 1e-6, False)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sentence-bert", {"model_type": "roberta"}, "model_type is 'roberta': models of bert, gemma3_text, llama, "),
        ("sentence-bert", {"model_type": ...}, "model_type is None"),
        ("sentence-bert", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new': only 'gelu' is computed"),
        ("sentence-bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("sentence-bert", {"hidden_size": None}, "hidden_size is None: give a whole number"),
        ("sentence-bert", {"num_attention_heads": 5}, "embed_dim is 12, not a multiple of num_heads 5"),
        (
            "sentence-bert",
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}: this is not computed",
        ),
        ("llama-mean", {"attention_bias": True}, "attention_bias is True: only False is computed"),
        ("llama-mean", {"mlp_bias": True}, "mlp_bias is True: only False is computed"),
        ("llama-mean", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' need factor, low_freq_factor"),
        ("llama-mean", {"rope_parameters": ..., "rope_scaling": {"type": "yarn"}}, "positions are scaled .'yarn'"),
        ("llama-mean", {"hidden_act": "relu"}, "hidden_act is 'relu': only silu or gelu_pytorch_tanh is computed"),
        (
            "qwen2-shards",
            {"layer_types": ["sliding_attention"]},
            "layer_types has 1 entries of sliding_attention: 2 of",
        ),
        ("qwen2-shards", {"layer_types": ["chunked_attention"] * 2}, "layer_types has 2 entries of chunked_attention"),
        (decoders.FIXTURES / "gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: this is"),
        (decoders.FIXTURES / "gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            decoders.FIXTURES / "gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
            "positions of local layers are scaled .'yarn'",
        ),
    ],
)
def test_a_config_that_cannot_be_computed_is_one_line(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_architecture(copied(FIXTURES / name, tmp_path, **changes))
    assert "\n" not in str(raised.value)


QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False, "rope_theta": 1e6}
PUBLISHED = {
    # config.json as it lies on the hub, what is read of it; the parameters the model is known to have.
    "Qwen2.5-0.5B": (
        QWEN | {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                "num_key_value_heads": 2, "num_hidden_layers": 24, "max_window_layers": 24, "sliding_window": 32768,
                "tie_word_embeddings": True, "vocab_size": 151936},
        {"pattern": "G", "window": 0, "head_dim": 64, "qkv_bias": True}, 494_032_768,
    ),
    "Qwen3-0.6B": (
        QWEN | {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
                "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
                "num_hidden_layers": 28, "max_window_layers": 28, "sliding_window": None, "rope_scaling": None,
                "tie_word_embeddings": True, "vocab_size": 151936},
        {"pattern": "G", "qk_norm": True, "rope_theta": 1e6}, 596_049_920,
    ),
    "Llama-3.2-1B": (
        {"model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 8192, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
         "vocab_size": 128256, "rope_scaling": {
             "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
             "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_positions": 8192, "rope_high": 4.0}, 1_235_814_400,
    ),
    "SmolLM2-135M": (
        {"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
         "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
         "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
         "vocab_size": 49152},
        {"head_dim": 64, "rope_theta": 1e5}, 134_515_008,
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
        {"pattern": "L", "window": 4096, "head_dim": 128}, 7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768},
        {"pattern": "G", "window": 0}, 7_248_023_552,
    ),
    "gemma-3-1b-it": (
        {"model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
         "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
         "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_hidden_layers": 26,
         "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
         "vocab_size": 262144},
        {"pattern": "LLLLLG", "window": 512, "rope_theta": 1e6, "local_rope_theta": 1e4, "tied": True,
         "attention_scale": 1 / 16, "embed_scale": 1152**0.5}, 999_885_952,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_models_that_are_known(tmp_path, name):
    config, wanted, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = read_architecture(tmp_path)
    assert isinstance(a, Architecture)
    assert {field: getattr(a, field) for field in wanted} == wanted
    assert num_parameters(a) == parameters


def test_windows_by_layer_are_the_shortest_pattern(tmp_path):
    a = read_architecture(decoders.FIXTURES / "qwen2-windows")
    assert isinstance(a, Architecture)
    assert (a.pattern, a.window, a.local) == ("GLL", 5, (False, True, True))
    off = read_architecture(copied(decoders.FIXTURES / "qwen2-windows", tmp_path, use_sliding_window=False))
    assert isinstance(off, Architecture)
    assert (off.pattern, off.window) == ("G", 0)
