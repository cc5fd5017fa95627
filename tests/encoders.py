"""Small checkpoints of encoders with what torch makes of them (tests/golden_encoders.py writes both)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "encoders"

TEXTS = [
    "The river Elbe flows through Dresden and Hamburg.",
    "Which river flows through Hamburg?",
    "",
    "Paris",
    "A long passage: " + "the cat sat on the mat while the river flowed through the city, " * 6,
    "naïve café, 東京 \u2013 42 % of ½",
    "  two  spaces\nand a new line ",
    "Hamburg flows and flows",
]

# For the real model: lengths of one word to several hundred tokens.
SENTENCES = [
    "",
    "Paris",
    "What is the capital of France?",
    "Paris is the capital and largest city of France.",
    "Berlin is the capital of Germany and has 3.7 million inhabitants.",
    "The mitochondrion is the powerhouse of the cell.",
    "Who wrote the novel on which the 1979 film was based?",
    "An electron has a mass of about 9.109e-31 kg.",
    "naïve café, 東京 \u2013 42 % of ½, Ĳsselmeer and ﬁnal",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!!!",
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b  # sums",
    "  spaces   and\ttabs\nand new lines  ",
    "[CLS] is a special token, and so are [SEP] and [MASK].",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism",
    "😀 emoji are not in the vocabulary, nor is \u200b a space of no width",
    "One two three four five six seven eight nine ten. " * 3,
    "The river Elbe rises in the Krkonoše mountains and flows into the North Sea at Cuxhaven. " * 4,
    "A passage of about one hundred and fifty words, again and again. " * 12,
    "Longer than what the model reads, so that the end is cut off and the last token kept. " * 30,
]


@dataclass(frozen=True)
class Checkpoint:
    """A model of transformers with small sizes; with prompts it is a folder of sentence-transformers."""

    name: str  # of its folder, from which its family is known
    model: str  # class in transformers
    config: dict[str, Any]
    pooling: str
    normalize: bool
    max_tokens: int
    prompts: dict[str, str] | None = None
    query_prefix: str = ""
    shard: str = "1GB"
    told: bool = True  # by the folder or the family; otherwise the caller gives pooling and normalize

    def given(self) -> dict[str, Any]:
        return {} if self.told else {"pooling": self.pooling, "normalize": self.normalize}


def _bert(width: int, heads: int, layers: int, inner: int, positions: int, pieces: int) -> dict[str, Any]:
    return {
        "vocab_size": pieces,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
    }


def _decoder(width: int, heads: int, kv_heads: int, layers: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": 64,
        **more,
    }


CHECKPOINTS = [
    Checkpoint(
        "sentence-bert", "BertModel", _bert(12, 4, 2, 20, 40, 90), "mean", True, 32,
        prompts={"query": "which: ", "document": "text: "},
    ),
    # Odd sizes, the names of a model with a head of its own, and a family known by its name.
    Checkpoint(
        "bge-small-odd", "BertForMaskedLM", _bert(15, 3, 2, 23, 29, 77), "cls", True, 29,
        query_prefix="Represent this sentence for searching relevant passages: ",
    ),
    Checkpoint(
        "Qwen3-Embedding-tiny", "Qwen3Model", _decoder(8, 4, 2, 2, 13, head_dim=6, rms_norm_eps=1e-5), "last", True, 40,
        prompts={"query": "Instruct: find the river\nQuery:", "document": ""},
    ),
    # In several files, with a head of its own, and nothing that says how it is pooled.
    Checkpoint(
        "qwen2-shards", "Qwen2ForCausalLM",
        _decoder(12, 3, 1, 2, 11, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "last", False, 40, shard="8KB", told=False,
    ),
    Checkpoint(
        "llama-mean", "LlamaModel", _decoder(8, 2, 2, 1, 10), "mean", True, 48, told=False,
    ),
]  # fmt: skip
