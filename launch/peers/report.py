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

Each trap by itself: the straightforward way beside the product's own function for the same thing, with equal results,
in turn in one process (`python -m launch.peers.traps`, medians over rounds). The cost is how much longer rlrag's own
step would take with the straightforward way in place of its own; costs overlap, so that they do not add up. What is
left beside them: one jitted program of fixed shapes a round, so that nothing is traced or compiled again while it runs,
and a prompt that stands once in a training row, before its answers (`python -m launch.bench --phase=update
--against=padded`).
"""


def write(recorded: Mapping[str, Recorded], about: Mapping[str, str], removed: Mapping[str, Any] | None = None) -> str:
    """The report. recorded: by workload, in order; about: what the header says, by name; removed: what
    launch.peers.traps found."""
    parts = ["# Decode and GRPO step beside the peers", "", *(f"- {name}: {text}" for name, text in about.items())]
    parts += [f"- logits of one prompt, largest difference to rlrag's: {agreement(recorded.values())}", ""]
    for one in recorded.values():
        parts += section(one)
    parts += [FAIRNESS, "Settings of rlrag:", ""]
    parts += [f"- {name}: {settings(one)}" for name, one in recorded.items()]
    return "\n".join([*parts, "", *([TRAPS, *traps(removed), ""] if removed else [])])


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


def traps(found: Mapping[str, Any]) -> list[str]:
    """The table of what launch.peers.traps found."""
    lines = ["| trap | straightforward, ms | rlrag, ms | ratio | cost | rounds |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        times = (f"{row[name]:.{2 if row[name] < 100 else 0}f}" for name in ("straight_ms", "ours_ms"))
        cells = row["trap"], *times, f"{row['ratio']:.2f}x", f"{row['cost']:+.0%} of {row['step']}", str(row["rounds"])
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"JAX {found['jax']}, {found['date']}."]


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
