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
