"""What all contenders do: the model, the prompts, the reward, and the workloads with what ours aims at.

Standard library alone: a peer's environment has none of our packages, ours none of theirs.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, TUNIX, TORCH = "rlrag", "tunix", "torch"
PAD, END = 0, 1
SHAPE = {
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
LEARNING_RATE, CLIP_NORM = 1e-5, 1.0


@dataclass(frozen=True)
class Workload:
    """generate: sample from every prompt `group` times. grpo: that, and one optimizer step on it."""

    name: str
    kind: str  # generate | grpo
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    targets: dict[str, float] = field(default_factory=dict)  # by peer: how many times as fast ours aims to be

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """New ones, all samples together."""
        return self.samples * self.new_tokens

    def describe(self) -> str:
        what = "decode" if self.kind == "generate" else "a whole GRPO step"
        group = f" in groups of {self.group}" if self.group > 1 else ""
        return f"{what}: {self.samples} samples{group}, prompts of {self.prompt_tokens}, {self.new_tokens} new tokens"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode_1", "generate", 1, 1, 64, 128),
        Workload("decode_64", "generate", 64, 1, 64, 128, {TUNIX: 1.8, TORCH: 3.0}),
        Workload("decode_512", "generate", 8, 8, 512, 64, {TUNIX: 4.0, TORCH: 4.0}),
        Workload("grpo_64", "grpo", 8, 8, 64, 128, {TUNIX: 2.2, TORCH: 2.2}),
        Workload("grpo_512", "grpo", 8, 8, 512, 64, {TUNIX: 2.5, TORCH: 2.5}),
    )
}


def word(token: int) -> str:
    """Every token of the vocabulary but padding and end is one word."""
    return f"w{token}"


def prompts(workload: Workload, seed: int, vocabulary: int) -> list[str]:
    """Random words, each a single token."""
    dice = random.Random(f"{workload.name} {seed}")
    return [
        " ".join(word(dice.randrange(2, vocabulary)) for _ in range(workload.prompt_tokens))
        for _ in range(workload.prompts)
    ]


def endless_prompts(workload: Workload, vocabulary: int, steps: int) -> Iterator[list[str]]:
    """Those of step after step of a training."""
    return (prompts(workload, step, vocabulary) for step in range(steps))


def reward(text: str) -> float:
    """A dummy that differs within a group."""
    return float(len(set(text)) % 7)


def save(workload: Workload, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(workload)))


def load(path: str | Path) -> Workload:
    """What a worker is told to do."""
    return Workload(**json.loads(Path(path).read_text()))


def vocabulary_of(folder: Path) -> int:
    """Of the model in a folder."""
    return read_shape(folder)["vocab_size"]


def read_shape(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
