"""The engine held against less: a sampler without continuous batching, and itself without shared prompts; and an update
on packed rows against one on padded rows."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels.ceilings import Ceilings
from rlrag.objectives.scoring import score
from rlrag.packing import Packed
from rlrag.speed import fixed_batch, padded, update
from rlrag.speed.phases import Row, finished, medians
from rlrag.speed.rollout import Player, packed, start
from rlrag.speed.searching import SlowSearcher
from rlrag.speed.shapes import Setting
from rlrag.speed.update import Pupil
from rlrag.speed.workload import Workload


def fixed_batches(setting: Setting, ceilings: Ceilings, rounds: int) -> Iterator[Row]:
    """Uneven episodes, played by the engine and by the plain sampler in turn. Searches answer at once."""
    a, sizes = setting.architecture, setting.sizes
    uneven = Workload(
        a.vocab_size, prompt_tokens=setting.talk.prompt_tokens, turns=(1, 5), turn_tokens=(4, 128),
        document_tokens=(16, 128), skewed=True,
    )  # fmt: skip
    weights, player = packed(a, start(a)), Player(a, sizes, uneven.capacity)
    root, mine, plain = jax.random.key(0), [], []
    searcher = SlowSearcher(0.0)
    # Once untimed: the plain sampler compiles a program for every length of its cache.
    player.play(weights, uneven, 2, searcher=searcher)
    episodes = [uneven.episode(example.id) for example in uneven.examples(setting.episodes, 0)]
    fixed_batch.play(a, weights, episodes, sizes.num_slots, root)
    for _ in range(rounds):
        ceilings.sample(3)
        played = player.play(weights, uneven, setting.episodes, searcher=searcher)
        mine.append(played.report(ceilings))
        seconds, tokens, lane_steps = fixed_batch.play(a, weights, episodes, sizes.num_slots, root)
        floor_s = mine[-1]["floor_s"]
        plain.append(
            {
                "tokens_per_s": tokens / seconds, "seconds": seconds, "floor_s": floor_s,
                "share_of_floor": floor_s / seconds, "sampled_tokens": tokens, "slot_occupancy": tokens / lane_steps,
            }
        )  # fmt: skip
    ratio = statistics.median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(mine, plain))
    yield finished({"run": "fixed batch", "ratio": 1.0} | medians(plain), ceilings)
    yield finished({"run": "engine", "ratio": ratio} | medians(mine) | {"programs": player.programs}, ceilings)


def sharing(setting: Setting, ceilings: Ceilings, rounds: int) -> Iterator[Row]:
    """A prompt of 512 and 64 tokens sampled, in groups that share it and as episodes of a prompt each."""
    a, size = setting.architecture, setting.group_size
    workload = Workload(a.vocab_size, prompt_tokens=512, turn_tokens=(64, 64))
    weights, player = packed(a, start(a)), Player(a, setting.sizes, workload.capacity)
    player.play(weights, workload, size, group_size=size)
    episodes = max(size, setting.episodes // size * size)
    runs: dict[str, list[Row]] = {"own prompts": [], f"groups of {size}": []}
    for number in range(rounds):
        for rows in runs.values():
            ceilings.sample(3)
            group = size if rows is runs[f"groups of {size}"] else 1
            rows.append(player.play(weights, workload, episodes, group_size=group, seed=number).report(ceilings))
    alone = runs["own prompts"]
    for name, rows in runs.items():
        ratio = statistics.median(row["tokens_per_s"] / own["tokens_per_s"] for row, own in zip(rows, alone))
        fewer = statistics.median(own["prefill_flops"] / row["prefill_flops"] for row, own in zip(rows, alone))
        row = {"run": name, "ratio": ratio, "prefill_flops_fewer": fewer} | medians(rows)
        yield finished(row | {"programs": player.programs}, ceilings)


class Learner(NamedTuple):
    """One way of learning from a batch: rows, and who learns from them."""

    made: Packed
    pupil: Pupil

    @property
    def columns(self) -> int:
        return self.made.num_micro * int(np.prod(self.made.batch.tokens.shape[1:]))


def padding(setting: Setting, ceilings: Ceilings, rounds: int) -> Iterator[Row]:
    """The same groups learned from thrice: in padded rows as others do (rlrag.speed.padded), in such rows by our own
    scoring and attention, and packed. tokens_per_s is of useful tokens, those of all streams, each counted whole."""
    a, learn, sizes = setting.architecture, setting.learn, setting.rows
    groups = learn.groups(setting.questions, setting.group_size)
    lengths = [t.streams[0].num_tokens for group in groups for t in group.trajectories]
    single = padded.sizes(len(lengths), max(lengths), sizes.rows * sizes.tokens)
    ways = {
        "padded": (single, partial(padded.score, learn.prompt_tokens)),
        "padded, our kernels": (single, score),
        "packed": (sizes, score),
    }
    learners = {
        name: Learner(
            update.packed(groups, rows, update.ALL),
            Pupil(a, start(a), update.ALL, len(lengths), len(groups), scoring),
        )
        for name, (rows, scoring) in ways.items()
    }
    gradients = {name: each.pupil.gradient(each.made) for name, each in learners.items()}
    for each in learners.values():
        each.pupil.learn(each.made)  # compiles the optimizer's step
    found: dict[str, list[Row]] = {name: [] for name in learners}
    for _ in range(rounds):
        ceilings.sample(3)
        for name, (made, pupil) in learners.items():
            learned = pupil.learn(made)
            report = pupil.report(made, learned, ceilings)
            found[name].append(report | {"tokens_per_s": sum(lengths) / learned.seconds})
    for name, each in learners.items():
        row = {"run": name, "ratio": faster(found, name, "padded")}
        row |= {"ratio_to_our_padded": faster(found, name, "padded, our kernels")}
        row |= medians(found[name]) | {"columns": each.columns}
        row |= {"gradient_apart": max(apart(gradients[name], gradient) for gradient in gradients.values())}
        row |= {"gradient_apart_most": max(farthest(gradients[name], gradient) for gradient in gradients.values())}
        yield finished(row | {"programs": max(each.pupil.programs.values())}, ceilings)


def faster(found: dict[str, list[Row]], name: str, other: str) -> float:
    """How many times as fast, median over rounds."""
    return statistics.median(its["seconds"] / own["seconds"] for own, its in zip(found[name], found[other]))


def farthest(first: Any, second: Any) -> float:
    """The largest |first - second| of any of their numbers."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), first, second)))


def apart(first: Any, second: Any) -> float:
    """||first - second|| / ||second|| of two gradients, over all their numbers: what it can do to a step."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    difference = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    return (difference / sum(float(np.sum(np.square(b, dtype=np.float64))) for _, b in pairs)) ** 0.5
