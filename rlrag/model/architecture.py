"""The shapes of models, as data: families differ here and nowhere else. Imports no JAX."""

from dataclasses import dataclass, field
from typing import ClassVar

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = ("", "linear", "llama3")
REMATS = ("", "all", "elementwise")
AUTO = "auto"  # of remat: the first that the devices have room for
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")  # the matrices of a layer
BASES = ("", "int8")
NO_ADAPTER = "none"  # in place of an adapter's name: the base alone
COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "scan_unroll",
)  # fmt: skip
ENCODER_COUNTS = (
    "vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_positions", "num_types", "scan_unroll",
)  # fmt: skip


@dataclass(unsafe_hash=True)
class Adapters:
    """Low-rank additions to the matrices of a model whose own parameters then stay as they are (LoRA, Hu et al. 2021,
    arXiv 2106.09685): x W + alpha / rank * x down up. Several lie on one base, each with a name that a role names."""

    MAIN: ClassVar[str] = "rank"

    rank: int = 0  # 0: none, the model itself learns
    alpha: float = 16.0  # the addition is multiplied by alpha / rank
    targets: str = ",".join(TARGETS)  # which matrices of every layer
    names: str = "policy"  # of the adapters, separated by commas; the first is that of a recipe with one role
    dropout: float = 0.0  # share of the inputs of an addition that is dropped while learning
    rows: int = 0  # newest rows of the vocabulary that learn as well; those that a published model lacks always do
    path: str = ""  # folders of peft that they begin as, in the order of names, separated by commas; empty: new

    @property
    def listed(self) -> tuple[str, ...]:
        """Their names, in order; none without a rank."""
        return tuple(self.names.split(",")) if self.rank else ()

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(self.targets.split(",")) if self.rank else ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def number(self, name: str) -> int:
        """The place of an adapter. ValueError where there is none of that name."""
        if name not in self.listed:
            raise ValueError(
                f"a role asks for the adapter {name!r}, and there is {self.names if self.rank else 'none'}: give "
                f"--config.model.adapters.names={name}{'' if self.rank else ' and --config.model.adapters.rank=16'}"
            )
        return self.listed.index(name)

    def check(self) -> None:
        if self.rank < 0 or self.rows < 0:
            name = "rank" if self.rank < 0 else "rows"
            raise ValueError(f"adapters.{name} is {getattr(self, name)}: give a positive number, or 0 for none")
        if not self.alpha > 0:
            raise ValueError(f"adapters.alpha is {self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapters.dropout is {self.dropout}: give at least 0 and less than 1")
        for name in self.targets.split(","):
            if name not in TARGETS:
                raise ValueError(f"adapters.targets has {name!r}: choose of {','.join(TARGETS)}")
        names, folders = self.names.split(","), self.path.split(",")
        if self.path and not self.rank:
            raise ValueError(
                f"adapters.path is {self.path!r}, but adapters.rank 0: give the rank that is r in its config"
            )
        if len(folders) > len(names):
            raise ValueError(f"adapters.path has {len(folders)} folders for {self.names}: give one for each at most")
        if not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
            raise ValueError(f"adapters.names is {self.names!r}: give distinct names, as reasoner,verifier")
        if NO_ADAPTER in names:
            raise ValueError(f"adapters.names has {NO_ADAPTER!r}, which stands for the base alone: give another name")


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
    # What of a layer the backward pass computes again: all | elementwise; empty: nothing; auto: as little as there is
    # room for.
    remat: str = ""
    scan_unroll: int = 1  # layers unrolled per scan step in training
    base: str = ""  # how the matrices of the layers are held, where adapters alone learn; int8: a byte a number
    adapters: Adapters = field(default_factory=Adapters)

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
            ("base", BASES), ("remat", (*REMATS, AUTO)),
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
        self.adapters.check()
        if self.base and not self.adapters.rank:
            raise ValueError(f"base is {self.base!r}, which cannot learn: give --config.model.adapters.rank=16 as well")
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
    remat: str = ""  # what of a layer the backward pass computes again: all | elementwise; empty: nothing
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
        for name, choices in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMATS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose {' or '.join(each or 'nothing' for each in choices)}"
                )
