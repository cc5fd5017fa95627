"""The shapes of models, as data: families differ here and nowhere else. Imports no JAX."""

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "scan_unroll",
)  # fmt: skip
ENCODER_COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_positions", "num_types", "scan_unroll",
)  # fmt: skip


@dataclass(unsafe_hash=True)
class Architecture:
    """A decoder of the Llama/Qwen shape. Hashable, so it can be a static argument; treat it as frozen once built."""

    vocab_size: int = 128
    num_layers: int = 2
    embed_dim: int = 128
    num_heads: int = 8  # query heads, N
    num_kv_heads: int = 8  # key/value heads, K; N must be a multiple of K
    head_dim: int = 16
    mlp_dim: int = 320
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied: bool = True  # the head is the embedding table
    qk_norm: bool = False  # RMSNorm of queries and keys per head (Qwen3)
    qkv_bias: bool = False  # biases of q, k, v (Qwen2)
    value_head: bool = False  # a number beside the vocabulary: what a critic says
    embed_scale: float = 1.0  # multiplies token embeddings at the input (Gemma: sqrt(embed_dim))
    dtype: str = "float32"  # of activations and decode weights
    param_dtype: str = "float32"
    remat: bool = False  # recompute each layer in the backward pass
    scan_unroll: int = 1  # layers unrolled per scan step in training

    def check(self) -> None:
        """Raise ValueError, naming the value, where the sizes cannot work together."""
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        for name in ("rope_theta", "norm_epsilon", "embed_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}: change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even number")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(DTYPES)}")


@dataclass(unsafe_hash=True)
class EncoderArchitecture:
    """A text encoder of the BERT shape: learned positions, token types, norms after the sums. Hashable, as above."""

    vocab_size: int = 128
    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 4  # each of embed_dim / num_heads
    mlp_dim: int = 256
    max_positions: int = 512  # rows of the position table: no longer text can be read
    num_types: int = 2  # rows of the token-type table
    norm_epsilon: float = 1e-12
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    remat: bool = False  # recompute each layer in the backward pass
    scan_unroll: int = 1  # layers unrolled per scan step

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def check(self) -> None:
        """Raise ValueError, naming the value, where the sizes cannot work together."""
        for name in ENCODER_COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}: give a number above 0")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, not a multiple of num_heads {self.num_heads}: change one of them"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(DTYPES)}")
