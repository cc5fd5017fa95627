"""What is measured of each model: its architecture, and sizes at which a rollout and an update are timed.

The demo's shape is the one on which other systems were measured (docs/LOG.md); the others are published models'.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlrag.model.architecture import Architecture
from rlrag.speed.rollout import Sizes
from rlrag.speed.update import RowSizes
from rlrag.speed.workload import Workload

DEMO = Architecture(
    vocab_size=4096, num_layers=4, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=1024,
    rope_theta=1e6, qkv_bias=True,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Everything that a phase needs beside weights."""

    architecture: Architecture
    sizes: Sizes
    decode: Workload  # one turn of equal length in every slot: nothing but decoding steps, and a short prompt
    talk: Workload  # turns with searches between them
    episodes: int  # of the talk
    learn: Workload  # groups that share a prompt, as in Search-R1 (prompt, answers of two turns, a document)
    rows: RowSizes
    questions: int  # groups of an update
    group_size: int = 8


def learned(vocabulary: int) -> Workload:
    """Search-R1's shape: a prompt, and answers of two turns with a document between them."""
    return Workload(vocabulary, prompt_tokens=512, turns=(2, 2), turn_tokens=(64, 64), document_tokens=(128, 128))


def demo() -> Setting:
    """Two cores play it in seconds."""
    V = DEMO.vocab_size
    return Setting(
        DEMO,
        Sizes(num_slots=64, max_episodes=512),
        Workload(V, prompt_tokens=64, turn_tokens=(128, 128)),
        Workload(V, prompt_tokens=32, turns=(4, 4), turn_tokens=(12, 36), document_tokens=(24, 24)),
        episodes=768,
        learn=learned(V),
        rows=RowSizes(rows=2, tokens=2688),
        questions=8,
    )


def published(a: Architecture) -> Setting:
    """A model of some billion parameters on one accelerator."""
    V = a.vocab_size
    return Setting(
        a,
        Sizes(num_slots=128, max_episodes=512, burst=16, prefill_rows=16, prefill_chunk=64, prefill_chunks=4),
        Workload(V, prompt_tokens=64, turn_tokens=(256, 256)),
        Workload(V, prompt_tokens=128, turns=(4, 4), turn_tokens=(32, 96), document_tokens=(96, 128)),
        episodes=1024,
        learn=learned(V),
        rows=RowSizes(rows=2, tokens=2688),
        questions=16,
    )


def changed(
    setting: Setting, *, layers: int = 0, scale: int = 1, dtype: str = "", changes: Mapping[str, int]
) -> Setting:
    """layers: how many of them are kept; scale: divisor of widths and vocabulary; dtype: of everything; changes: fields
    of the sizes, the talk, the rows and the setting itself, by name, 0: as it is."""
    setting = replace(setting, architecture=smaller(setting.architecture, layers, scale, dtype))
    for part in ("decode", "talk", "learn"):
        own = replace(getattr(setting, part), vocab_size=setting.architecture.vocab_size)
        setting = replace(setting, **{part: own})
    given = {name: value for name, value in changes.items() if value}
    for part, names in PARTS.items():
        own = {field: between(name, given.pop(name)) for name, field in names.items() if name in given}
        setting = replace(setting, **({part: replace(getattr(setting, part), **own)} if part else own))
    assert not given, f"nothing is called {', '.join(given)}"
    return setting


# Part of a setting ("" is the setting itself) -> name of a change -> field.
PARTS: dict[str, dict[str, str]] = {
    "sizes": {
        name: name
        for name in (
            "num_slots",
            "max_episodes",
            "burst",
            "page_size",
            "prefill_rows",
            "prefill_chunk",
            "prefill_chunks",
        )
    },
    "talk": {
        "prompt_tokens": "prompt_tokens",
        "turns": "turns",
        "turn_tokens": "turn_tokens",
        "document_tokens": "document_tokens",
    },
    "decode": {"decode_tokens": "turn_tokens"},
    "rows": {"micro_rows": "rows", "row_tokens": "tokens"},
    "": {"episodes": "episodes", "questions": "questions"},
}


def between(name: str, value: int) -> Any:
    """Turns and documents are as many as said; a turn's tokens are between half and one and a half of it."""
    if name == "turn_tokens":
        return max(1, value // 2), value + value // 2
    return (value, value) if name in ("turns", "document_tokens", "decode_tokens") else value


def smaller(a: Architecture, layers: int, scale: int, dtype: str) -> Architecture:
    """Widths divided by scale, as far as an architecture can be made of them."""
    heads = max(1, a.num_heads // scale)
    kv_heads = max(k for k in range(1, min(a.num_kv_heads, heads) + 1) if heads % k == 0)
    return replace(
        a,
        num_layers=min(layers, a.num_layers) if layers else a.num_layers,
        vocab_size=max(64, a.vocab_size // scale),
        embed_dim=max(16, a.embed_dim // scale),
        mlp_dim=max(16, a.mlp_dim // scale),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=a.head_dim if scale == 1 else max(8, a.head_dim // scale // 2 * 2),
        dtype=dtype or a.dtype,
        param_dtype=dtype or a.param_dtype,
    )
