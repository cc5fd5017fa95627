"""Shapes of real models at which the kernels are timed; tests use the same list scaled down.

Sizes are from the published ``config.json`` of each model (hidden_size, vocab_size, tie_word_embeddings).
"""

from typing import NamedTuple


class HeadSpec(NamedTuple):
    """The vocabulary head of a model and the number of tokens and slots it is typically used with on one device."""

    name: str
    hidden: int  # D
    vocabulary: int  # V
    tied: bool  # the head is the token embedding
    tokens: int  # scored at once in training
    slots: int  # rows of a decode step

    def scaled(self, divisor: int) -> "HeadSpec":
        """The same proportions, ``divisor`` times smaller in D and V; for CPU."""
        return self._replace(
            name=f"{self.name}/{divisor}",
            hidden=max(8, self.hidden // divisor),
            vocabulary=max(64, self.vocabulary // divisor),
            tokens=max(16, self.tokens // divisor),
            slots=max(2, self.slots // divisor),
        )


class RecurrenceSpec(NamedTuple):
    """A batch of rows over which credit flows."""

    name: str
    rows: int  # B
    tokens: int  # T


class DecodeSpec(NamedTuple):
    """Attention of a decode step in one layer (num_attention_heads, num_key_value_heads, head_dim of config.json)."""

    name: str
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    slots: int  # B
    shortest: int  # tokens of a slot, uniform between the two
    longest: int

    def scaled(self, divisor: int) -> "DecodeSpec":
        """The same heads over ``divisor`` times fewer slots and tokens; for CPU."""
        return self._replace(
            name=f"{self.name}/{divisor}",
            slots=max(2, self.slots // divisor),
            shortest=max(1, self.shortest // divisor),
            longest=max(64, self.longest // divisor),
        )

    @property
    def read_bytes(self) -> int:
        """Of bfloat16 keys and values that a step reads on average: its least work."""
        return 4 * self.kv_heads * self.head_dim * self.slots * (self.shortest + self.longest) // 2


DEMO = HeadSpec("demo", hidden=256, vocabulary=4096, tied=True, tokens=4096, slots=64)

HEADS = (
    HeadSpec("qwen2.5-0.5b", hidden=896, vocabulary=151_936, tied=True, tokens=32_768, slots=512),
    HeadSpec("qwen2.5-3b", hidden=2048, vocabulary=151_936, tied=True, tokens=16_384, slots=256),
    HeadSpec("qwen2.5-7b", hidden=3584, vocabulary=152_064, tied=False, tokens=16_384, slots=256),
    HeadSpec("qwen3-8b", hidden=4096, vocabulary=151_936, tied=False, tokens=16_384, slots=256),
    HeadSpec("llama-3-8b", hidden=4096, vocabulary=128_256, tied=False, tokens=16_384, slots=256),
)

RECURRENCES = (
    RecurrenceSpec("demo", rows=64, tokens=1024),
    RecurrenceSpec("search, 4k window", rows=256, tokens=4096),
    RecurrenceSpec("search, 16k window", rows=64, tokens=16_384),
)

DECODES = (
    DecodeSpec("qwen2.5-0.5b", heads=14, kv_heads=2, head_dim=64, slots=128, shortest=1024, longest=4096),
    DecodeSpec("qwen2.5-3b", heads=16, kv_heads=2, head_dim=128, slots=128, shortest=1024, longest=4096),
    DecodeSpec("qwen2.5-7b", heads=28, kv_heads=4, head_dim=128, slots=128, shortest=1024, longest=4096),
    DecodeSpec("qwen3-8b", heads=32, kv_heads=8, head_dim=128, slots=128, shortest=1024, longest=4096),
    DecodeSpec("llama-3-8b", heads=32, kv_heads=8, head_dim=128, slots=128, shortest=1024, longest=4096),
)
