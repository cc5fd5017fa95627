"""The least work of each phase, and the least time it takes where a device does nothing else at its ceilings.

Products count 2 operations an entry. Bytes are those that cannot stay in a cache: weights once a step, keys and values
of what is attended to, gradients and optimizer state. What is done element by element is in neither; so a floor is a
lower bound, and what is measured beside it is the gap.
"""

from typing import NamedTuple, Protocol

from rlrag.model.architecture import Architecture
from rlrag.speed.workload import Volume

BYTES = {"float32": 4, "bfloat16": 2}


class Rates(Protocol):
    """What a device does at best, measured (kernels.ceilings)."""

    @property
    def flops(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...


class Work(NamedTuple):
    flops: float
    moved_bytes: float

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.moved_bytes + other.moved_bytes)

    def seconds(self, rates: Rates) -> float:
        """At the ceilings, both overlapping fully."""
        return max(self.flops / rates.flops, self.moved_bytes / rates.bandwidth)

    def bound(self, rates: Rates) -> str:
        return "matrix" if self.flops / rates.flops > self.moved_bytes / rates.bandwidth else "bandwidth"


def attention_weights(a: Architecture) -> int:
    """Entries of q, k, v and output of one layer."""
    return a.embed_dim * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)


def layer_weights(a: Architecture) -> int:
    """Entries of the matrices of one layer."""
    return attention_weights(a) + 3 * a.embed_dim * a.mlp_dim


def head_weights(a: Architecture) -> int:
    return a.vocab_size * a.embed_dim


def num_weights(a: Architecture) -> int:
    """Entries of all matrices, the embedding once where it is tied."""
    return a.num_layers * layer_weights(a) + head_weights(a) * (1 if a.tied else 2)


def cache_bytes(a: Architecture) -> int:
    """Of the keys and values of one token."""
    return 2 * a.num_layers * a.num_kv_heads * a.head_dim * BYTES[a.dtype]


def mixing_flops(a: Architecture) -> int:
    """Scores and weighted values of one token that sees one token, all layers."""
    return 4 * a.num_layers * a.num_heads * a.head_dim


def decoding(a: Architecture, volume: Volume, num_slots: int) -> Work:
    """Sampling with every slot busy all the time: weights are read once for num_slots tokens."""
    weights = a.num_layers * layer_weights(a) + head_weights(a)
    steps = volume.sampled / num_slots
    return Work(
        2.0 * volume.sampled * weights + mixing_flops(a) * volume.sampled_context,
        steps * weights * BYTES[a.dtype] + (volume.sampled_context + volume.sampled) * cache_bytes(a),
    )


def prefilling(a: Architecture, tokens: float, context: float, together: int) -> Work:
    """Reading prompts and documents, `together` tokens at once. Of the last layer keys and values alone are needed."""
    inner = (a.num_layers - 1) * layer_weights(a)
    weights = inner + 2 * a.embed_dim * a.num_kv_heads * a.head_dim
    share = (a.num_layers - 1) / a.num_layers
    return Work(
        2.0 * tokens * weights + share * mixing_flops(a) * context,
        tokens / together * weights * BYTES[a.dtype] + tokens * cache_bytes(a),
    )


class Rows(NamedTuple):
    """A packed batch."""

    tokens: int  # that are no padding
    pairs: int  # summed over them: tokens each sees
    micros: int  # micro-batches


def learning(a: Architecture, rows: Rows, whole: bool) -> Work:
    """Gradients: three products forward and backward for every matrix that learns, two where adapters alone do (their
    own products are left out). What is computed again (remat, logits) is not counted, as is usual."""
    passes = 3 if whole else 2
    weights = a.num_layers * layer_weights(a) + head_weights(a)
    flops = passes * 2.0 * weights * rows.tokens + 3.0 * mixing_flops(a) * rows.pairs
    own = num_weights(a)
    # Every micro-batch reads the weights twice, and adds to the float32 gradients.
    moved = rows.micros * (2 * own * BYTES[a.param_dtype] + (8 * own if whole else 0))
    return Work(flops, moved)


def stepping(a: Architecture, whole: bool) -> Work:
    """One step of AdamW with a clip: gradients are read twice, two moments and the masters read and written."""
    if not whole:
        return Work(0, 0)
    masters = 8 if a.param_dtype != "float32" else 0
    return Work(0, num_weights(a) * (8 + 16 + masters + 2 * BYTES[a.param_dtype]))


def state_bytes(a: Architecture, optimizer: bool) -> int:
    """Parameters, and float32 gradients beside those of a micro-batch; with an optimizer its moments and masters."""
    own = num_weights(a)
    masters = 4 if a.param_dtype != "float32" else 0
    return own * (2 * BYTES[a.param_dtype] + 4 + (8 + masters if optimizer else 0))
