"""docs/results/peers.md from what was measured, which peers.json holds."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from launch.peers.workloads import OURS, TORCH, TUNIX, Workload

Recorded = Mapping[str, Any]  # one workload's measurements
LABELS = {
    (OURS, "generate"): "rlrag",
    (OURS, "grpo"): "rlrag",
    (TUNIX, "generate"): "Tunix Sampler",
    (TUNIX, "grpo"): "Tunix GRPOLearner",
    (TORCH, "generate"): "transformers generate",
    (TORCH, "grpo"): "TRL GRPOTrainer",
}

FAIRNESS = """\
## What each side does

The same random weights (a Qwen2 of 4 layers, width 256, 4 query and 2 key-value heads of 64, MLP 1024, vocabulary 4096,
tied, with biases; 5.0 M parameters), the same word-level tokenizer, the same prompts of random single-token words,
float32, temperature 1, no top-k, no top-p, lengths forced. Contenders take turns within a round, one works while the
others wait; ratios are taken within rounds. Before anything is timed the logits of one prompt are compared.

- **rlrag** is the product: the engine with its pages, stop strings (looked for at every token, never found), limits,
  per-token log-prob, entropy, certainty and margin, weights packed anew for every rollout. A GRPO step is a round of
  the training loop, from one row of metrics.jsonl to the next: rollout, reward, packing, prepare, accumulate, apply,
  all metrics to JSONL and TensorBoard, sixteen episodes logged, alarms watched. Lengths are forced by an end token
  that is no token. Its settings of speed are below; they were chosen for these sizes, as a user can.
- **Tunix**: decoding by its Sampler with the end and padding tokens forbidden. Its GRPO cannot forbid a token: there
  too an end token that is no token forces the lengths, and the loss masks what follows a sampled end token (one token
  in 4096). Vanilla rollout, one micro-batch, no metrics written.
- **transformers, TRL**: `generate` with the dynamic cache and `min_new_tokens`, which forbids the end token;
  GRPOTrainer with the same, `beta=0`, one batch, nothing reported.
- GRPO everywhere: 8 prompts x 8 samples, one optimizer step a rollout, AdamW 1e-5, gradients clipped to norm 1, no
  reference model, reward `len(set(text)) % 7`.
"""

TRAPS = """\
## Where the time goes, and what rlrag does about it

- One jitted program of fixed shapes a round: nothing is traced or compiled again, the host is idle.
- Weights of decoding are fused and laid out by layer once a rollout, outside the loop; the cache is laid out by head.
- One uniform number a row, and an inverse CDF in two levels, in place of V random numbers; the log-prob of what was
  sampled comes from the same logits, so that no second pass scores the old policy.
- A group's prompt is prefilled once, and stands once in a training row, before its answers.
- Products of the update are two-dimensional; SwiGLU has its own gradient behind a barrier; logits are made in chunks
  and never stored; buffers are donated.
"""


def write(recorded: Mapping[str, Recorded], about: Mapping[str, str]) -> str:
    """The report. recorded: by workload, in order; about: what the header says, by name."""
    parts = ["# Decode and GRPO step beside the peers", "", *(f"- {name}: {text}" for name, text in about.items())]
    parts += [f"- logits of one prompt, largest difference to rlrag's: {agreement(recorded.values())}", ""]
    for one in recorded.values():
        parts += section(one)
    parts += [FAIRNESS, "Settings of rlrag:", ""]
    parts += [f"- {name}: {settings(one)}" for name, one in recorded.items()]
    return "\n".join([*parts, "", TRAPS])


def section(one: Recorded) -> list[str]:
    """The table of a workload."""
    workload, rounds = Workload(**one["workload"]), one["rounds"]
    lines = [f"## {workload.name}", "", f"{workload.describe()}. {len(rounds)} rounds, {one['date']}.", ""]
    lines += ["| | seconds, median (range) | tokens/s | rlrag is faster by, median (range) | aimed at | |", "|---|---|---|---|---|---|"]  # fmt: skip # noqa: E501
    for name in rounds[0]:
        seconds = [each[name]["seconds"] for each in rounds]
        row = [LABELS[name, workload.kind], spread(seconds, ".2f"), f"{workload.tokens / median(seconds):,.0f}"]
        if name == OURS or OURS not in rounds[0]:
            row += ["", "", ""]
        else:
            faster, target = ratios(rounds, name), workload.targets.get(name)
            aimed = [f"{target:g}x", "reached" if median(faster) >= target else "**missed**"] if target else ["", ""]
            row += [spread(faster, ".2f", "x"), *aimed]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *parts_of_step(rounds)]


def parts_of_step(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of our step is the update."""
    ours = [each[OURS] for each in rounds if "update_s" in each.get(OURS, {})]
    if not ours:
        return []
    update, device = (median(each[name] for each in ours) for name in ("update_s", "device_s"))
    return [f"Of rlrag's step the update takes {update:.2f} s, the device in the rollout {device:.2f} s (medians).", ""]


def ratios(rounds: Sequence[Mapping[str, Any]], peer: str) -> list[float]:
    """How many times as fast ours was, round by round."""
    return [each[peer]["seconds"] / each[OURS]["seconds"] for each in rounds]


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    return f"{median(values):{form}}{unit} ({min(values):{form}}-{max(values):{form}})"


def agreement(recorded: Any) -> str:
    worst: dict[str, float] = {}
    for one in recorded:
        for name, difference in one["agreement"].items():
            worst[name] = max(worst.get(name, 0.0), difference)
    return ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items()) or "no peer was asked"


def settings(one: Recorded) -> str:
    return ", ".join(f"{name} {value}" for name, value in one["settings"].items())
