"""Update throughput on packed rows against padded ones: python -m launch.update_bench

The same episodes (groups of answers to one prompt, documents between their parts; random weights and tokens) are
learned from twice: packed, several streams a row and a group's prompt once, and padded, every stream a row of its own
as long as the longest. Both ways run the same programs: prepare, accumulate over all micro-batches, apply. Useful
tokens are those of the streams, each counted whole, so that both have equally many. Runs are interleaved; the ratio
is taken within each round, and the gradients of the two ways are held against each other.
"""

import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from absl import flags


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    def number(name: str, default: int, text: str) -> None:
        flags.DEFINE_integer(name, default, text, flag_values=values)

    number("rounds", 5, "Repetitions of both ways.")
    number("questions", 4, "Groups of a batch.")
    number("group_size", 8, "Answers to a question.")
    number("prompt_tokens", 512, "Tokens of a prompt, the same of all answers to it.")
    number("answer_tokens", 128, "Sampled tokens of an answer, over all its turns.")
    number("turns", 2, "Turns of an answer: a document stands between two.")
    number("document_tokens", 128, "Tokens of a document.")
    number("row_tokens", 0, "Columns of a packed row; 0: a whole group fits.")
    number("micro_tokens", 6144, "Columns of a micro-batch at most.")
    number("layers", 4, "Layers of the model.")
    number("embed_dim", 256, "Width of the model.")
    number("vocabulary", 4096, "Entries of the vocabulary.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations and parameters.", flag_values=values)
    flags.DEFINE_string("out", "", "File for the figures as JSON.", flag_values=values)


class Way(NamedTuple):
    """One layout of the batch, ready to run."""

    step: Callable[[], float]  # prepare, accumulate, apply: seconds
    gradient: Callable[[], Any]  # of the whole batch at the first parameters
    columns: int  # of the micro-batches that are used
    fill: float


def main(f: flags.FlagValues) -> None:
    import jax

    date, device = datetime.date.today(), f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"# {date}  {device}  JAX {jax.__version__}  python -m launch.update_bench {' '.join(sys.argv[1:])}")
    figures = measure(f)
    for line in told(figures):
        print(line)
    if f.out:
        Path(f.out).write_text(json.dumps({"date": str(date), "device": device, **figures}, indent=1))


def measure(f: flags.FlagValues) -> dict[str, Any]:
    """Figures of both ways, interleaved."""
    groups = episodes(f)
    streams = [t.streams[0] for group in groups for t in group.trajectories]
    useful, longest = sum(s.num_tokens for s in streams), max(s.num_tokens for s in streams)
    whole = f.prompt_tokens - 1 + f.group_size * (longest - f.prompt_tokens + 1)
    row = f.row_tokens or -(-whole // 8) * 8
    ways = {
        "packed": build(f, groups, row, max_segments=2 + f.group_size),
        "padded": build(f, groups, longest, max_segments=2),
    }
    difference = relative_difference(*(way.gradient() for way in ways.values()))
    for way in ways.values():
        way.step()  # compiles prepare and apply
    rounds = [{name: way.step() for name, way in ways.items()} for _ in range(f.rounds)]
    seconds = {name: median(r[name] for r in rounds) for name in ways}
    return {
        "useful_tokens": useful,
        "columns": {name: way.columns for name, way in ways.items()},
        "fill": {name: way.fill for name, way in ways.items()},
        "seconds": seconds,
        "tokens_per_s": {name: useful / each for name, each in seconds.items()},
        "ratio": median(r["padded"] / r["packed"] for r in rounds),
        "ratios": [r["padded"] / r["packed"] for r in rounds],
        "gradient_difference": difference,
    }


def told(figures: dict[str, Any]) -> list[str]:
    lines = [f"{'':<8}{'columns':>10}{'fill':>8}{'step s':>10}{'useful tokens/s':>18}"]
    for name in figures["seconds"]:
        lines.append(
            f"{name:<8}{figures['columns'][name]:>10,}{figures['fill'][name]:>8.3f}{figures['seconds'][name]:>10.3f}"
            f"{figures['tokens_per_s'][name]:>18,.0f}"
        )
    rounds = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    lines.append(f"packed is {figures['ratio']:.2f}x as fast (rounds: {rounds})")
    lines.append(f"gradients differ by {figures['gradient_difference']:.1e} of their norm, in the worst leaf")
    return lines


def episodes(f: flags.FlagValues):
    """Groups of random tokens: a prompt, then parts of an answer with documents between them."""
    import numpy as np

    from rlrag.trajectory import OBSERVED, SAMPLED, Example, Group, Span, Stream, Trajectory

    dice = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return dice.integers(f.vocabulary, size=count).astype(np.int32)

    def trajectory(example: Example, sample: int, prompt: np.ndarray) -> Trajectory:
        stream = Stream("main", "agent")
        stream.add(Span("agent", OBSERVED, prompt))
        for turn, part in enumerate(np.array_split(np.arange(f.answer_tokens), f.turns)):
            if turn:
                stream.add(Span("agent", OBSERVED, tokens(f.document_tokens)))
            logp = np.full(len(part), -np.log(f.vocabulary), np.float32)
            stream.add(Span("agent", SAMPLED, tokens(len(part)), logp, -logp, logp * 0))
        return Trajectory(example, sample, [stream])

    groups = []
    for question in range(f.questions):
        example, prompt = Example(str(question), "", ()), tokens(f.prompt_tokens)
        groups.append(Group(example, [trajectory(example, sample, prompt) for sample in range(f.group_size)]))
    return groups


def build(f: flags.FlagValues, groups, row_tokens: int, max_segments: int) -> Way:
    import jax
    import numpy as np

    from rlrag.mesh import make_mesh
    from rlrag.model.architecture import Architecture
    from rlrag.model.parameters import initialize
    from rlrag.objectives.credit import group_relative
    from rlrag.objectives.losses import surrogate
    from rlrag.objectives.optimizer import build_optimizer, build_schedule
    from rlrag.objectives.update import Update, build_prepare
    from rlrag.packing import Shape, pack
    from rlrag.rewards.paid import Paid

    heads = max(1, f.embed_dim // 64)
    a = Architecture(
        vocab_size=f.vocabulary, num_layers=f.layers, embed_dim=f.embed_dim, num_heads=heads,
        num_kv_heads=max(1, heads // 2), head_dim=64, mlp_dim=4 * f.embed_dim, rope_theta=1e6, scan_unroll=f.layers,
        dtype=f.dtype, param_dtype=f.dtype,
    )  # fmt: skip
    rows = max(1, f.micro_tokens // row_tokens)
    most = len(groups) * f.group_size
    shape = Shape(min(rows, most), row_tokens, max_segments, -(-most // rows), num_kept=0, num_rewards=1)
    paid = [[Paid({"answer": [float(t.sample % 3 == 0)]}) for t in group.trajectories] for group in groups]
    packed = pack(groups, paid, {"agent": 0}, ("answer",), shape)
    mesh, objective = make_mesh(devices=jax.devices()[:1]), surrogate()
    schedule = build_schedule("constant", 1e-6, 0, 100, 0.0)
    optimizer = build_optimizer(schedule, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0, master=f.dtype != "float32")
    update = Update(a, objective, optimizer, schedule, mesh)
    prepare = build_prepare(
        {"m": a}, {"m": objective}, {"m": "m"}, group_relative(), packed.num_groups, packed.num_episodes, mesh
    )
    state = update.initialize(jax.jit(lambda: initialize(a, jax.random.key(0)))())
    micros = range(packed.num_micro)

    def prepared():
        batch = update.put(packed.batch)
        return prepare({"m": state.params}, {"m": None}, {"m": batch}, {"m": np.int32(len(micros))}, {})

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        ready = prepared()
        state, sums, applied = update.step(state, ready.batches["m"], ready.counts["m"], {}, micros)
        jax.block_until_ready((state, sums, applied))
        return time.perf_counter() - begin

    def gradient():
        return jax.device_get(gradient_of(update, state, prepared(), micros))

    return Way(step, gradient, packed.num_micro * shape.rows * row_tokens, packed.fill)


def gradient_of(update, state, ready, micros: Sequence[int]):
    """The whole batch's gradient, through the program that the update runs."""
    import numpy as np

    batch, counts = ready.batches["m"], ready.counts["m"]
    chosen = np.zeros(batch.tokens.shape[0], np.float32)
    chosen[list(micros)] = 1
    gradient, sums = update._zeros(), update.no_metrics(batch)
    for index in micros:
        gradient, sums = update.accumulate(
            state.params, gradient, sums, batch, counts, {}, chosen, np.int32(index), state.step
        )
    return gradient


def relative_difference(first, second) -> float:
    """The largest |a - b| / |b| of any leaf, in the Euclidean norm."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs)


if __name__ == "__main__":
    from launch.flags import run

    run(main, define_flags, doc=__doc__)
