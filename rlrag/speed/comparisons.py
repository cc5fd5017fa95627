"""The engine held against less: a sampler without continuous batching, and itself without shared prompts."""

import statistics
from collections.abc import Iterator

import jax

from kernels.ceilings import Ceilings
from rlrag.speed import fixed_batch
from rlrag.speed.phases import Row, finished, medians
from rlrag.speed.rollout import Player, packed, start
from rlrag.speed.searching import SlowSearcher
from rlrag.speed.shapes import Setting
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
