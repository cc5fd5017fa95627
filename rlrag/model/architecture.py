"""The shapes of models, as data: families differ here and nowhere else. Imports no JAX."""

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = ("", "linear", "llama3")
COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "scan_unroll",
)  # fmt: skip
ENCODER_COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_positions", "num_types", "scan_unroll",
)  # fmt: skip


@dataclass(unsafe_hash=True)
class Architecture:
    """A decoder: blocks of rotary attention and a gated MLP. Hashable, so it can be a static argument; treat it as
    frozen once built."""

    vocab_size: int = 128
    num_layers: int = 2
    embed_dim: int = 128
    num_heads: int = 8  # query heads, N
    num_kv_heads: int = 8  # key/value heads, K; N must be a multiple of K
    head_dim: int = 16
    mlp_dim: int = 320
    rope_theta: float = 10_000.0
    rope_scaling: str = ""  # how the rotary frequencies are stretched: linear | llama3; empty: not at all
    rope_factor: float = 1.0  # by how much; the three below are llama3's
    rope_low: float = 1.0  # frequencies of fewer turns within rope_positions are divided by the factor
    rope_high: float = 4.0  # those of more are kept; between the two a mixture
    rope_positions: int = 8192  # that the model was first trained on
    pattern: str = "G"  # what each layer sees, repeated: G (global) all before it, L (local) the last `window` tokens
    window: int = 0  # tokens, the newest among them
    local_rope_theta: float = 0.0  # of local layers, unscaled; 0: as global ones
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # added to the scale of every norm (Gemma: 1)
    post_norms: bool = False  # a norm after attention and after the MLP too (Gemma)
    activation: str = "silu"  # of the gate: silu | gelu_tanh
    attention_scale: float = 0.0  # multiplies scores; 0: head_dim^-0.5
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
        for name, choices in (
            ("dtype", DTYPES), ("param_dtype", DTYPES), ("activation", ACTIVATIONS), ("rope_scaling", ROPE_SCALINGS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose {' or '.join(each or 'nothing' for each in choices)}"
                )
        for name in ("rope_factor", "rope_low", "rope_high", "rope_positions"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.rope_high <= self.rope_low:
            raise ValueError(f"rope_high is {self.rope_high}: give more than rope_low, {self.rope_low}")
        for name in ("attention_scale", "local_rope_theta", "window"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0, or 0 for none")
        if not self.pattern or set(self.pattern) - {"G", "L"}:
            raise ValueError(f"pattern is {self.pattern!r}: write G (global) and L (local), as LLLLLG")
        if any(self.local) and not self.window:
            raise ValueError(f"window is 0, but the pattern {self.pattern!r} has local layers: say how far they see")

    @property
    def local(self) -> tuple[bool, ...]:
        """For each layer, whether it sees the last `window` tokens alone."""
        return tuple(self.pattern[layer % len(self.pattern)] == "L" for layer in range(self.num_layers))


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
