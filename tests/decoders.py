"""The decoders whose torch outputs lie in tests/fixtures/decoders: tiny and odd shapes of every family."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
ADAPTER = FIXTURES / "qwen2-adapter"  # what peft wrote of the decoder qwen2 (tests/golden_adapters.py)
CONTINUED = 64  # tokens of the greedy continuations
PROMPTS = (11, 4, 17)  # tokens of each
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """One saved model. shard: bytes of a file at most, as transformers takes them."""

    name: str
    family: str  # of transformers' classes: Qwen2Config, Qwen2ForCausalLM
    config: dict[str, Any]
    shard: str = "1GB"


def shape(
    vocabulary: int, width: int, heads: int, kv_heads: int, layers: int, inner: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
        **more,
    }


CHECKPOINTS = (
    Checkpoint("qwen2", "Qwen2", shape(41, 12, 3, 1, 2, 11, True, rope_parameters={"rope_theta": 1e6})),
    # Windows from the second layer on, in several files, with a head of its own.
    Checkpoint(
        "qwen2-windows", "Qwen2",
        shape(53, 16, 4, 2, 3, 21, False, use_sliding_window=True, max_window_layers=1, sliding_window=5), "6KB",
    ),
    Checkpoint("qwen3", "Qwen3", shape(47, 10, 4, 2, 2, 17, False, head_dim=6, rms_norm_eps=1e-5)),
    Checkpoint("llama3", "Llama", shape(59, 16, 4, 2, 2, 23, False, rope_parameters=LLAMA3, rms_norm_eps=1e-5), "9KB"),
    # SmolLM2: nine heads over three, tied.
    Checkpoint("smollm2", "Llama", shape(37, 18, 9, 3, 2, 13, True, rope_parameters={"rope_theta": 1e5})),
    Checkpoint("mistral", "Mistral", shape(43, 12, 4, 2, 3, 19, False, head_dim=10, sliding_window=7)),
    Checkpoint(
        "gemma3", "Gemma3Text",
        shape(61, 14, 2, 1, 7, 15, True, head_dim=8, sliding_window=6, query_pre_attn_scalar=7, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }),
    ),
)  # fmt: skip
