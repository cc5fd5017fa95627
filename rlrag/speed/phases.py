"""The phases of a training step, each timed against its floor, with the ceilings sampled between the runs."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax

from kernels.ceilings import Ceilings
from rlrag.speed import update
from rlrag.speed.floor import Rates, cache_bytes, decoding, learning, prefilling, state_bytes, stepping
from rlrag.speed.machine import compilations, memory_limit, peak_bytes, profiled
from rlrag.speed.rollout import Player, Sizes, packed, read, start
from rlrag.speed.searching import SearcherOf, SlowSearcher
from rlrag.speed.shapes import Setting
from rlrag.speed.update import Pupil, rows_of
from rlrag.speed.workload import Workload, volume

Row = dict[str, Any]


def medians(rows: Sequence[Row]) -> Row:
    """Of numbers; of anything else the last."""

    def one(name: str) -> Any:
        values = [row[name] for row in rows]
        numbers = all(isinstance(value, int | float) for value in values)
        return statistics.median(values) if numbers else values[-1]

    return {name: one(name) for name in rows[-1]}


def finished(row: Row, rates: Rates) -> Row:
    return row | {"peak_bytes": peak_bytes(), "ceiling_flops": rates.flops, "ceiling_bandwidth": rates.bandwidth}


def longest(setting: Setting) -> int:
    """Tokens of an episode of the rollout at most."""
    return max(setting.talk.capacity, setting.decode.capacity)


# -- rollout ----------------------------------------------------------------------------------------------------------


def rollout(
    setting: Setting, ceilings: Ceilings, latencies_s: Sequence[float], searcher_of: SearcherOf, rounds: int,
    profile: str = "",
) -> Iterator[Row]:  # fmt: skip
    """Decoding alone with every slot busy, then episodes that search, at every latency; the ratio is to no latency,
    within each round. profile: folder for a trace of decoding, once more."""
    a, talk = setting.architecture, setting.talk
    with compilations() as compiled:
        weights = packed(a, start(a))
        player = Player(a, setting.sizes, longest(setting))
        player.play(weights, setting.decode, 2)
    built = {"compile_s": compiled.seconds}
    steady: list[Row] = []
    for number in range(rounds):
        ceilings.sample(3)
        steady.append(player.play(weights, setting.decode, setting.sizes.num_slots, seed=number).report(ceilings))
    yield finished({"run": "decode"} | medians(steady) | built | {"programs": player.programs}, ceilings)
    with profiled(profile):
        if profile:
            player.play(weights, setting.decode, setting.sizes.num_slots)
    runs: dict[float, list[Row]] = {latency: [] for latency in latencies_s}
    for number in range(rounds):
        for latency in latencies_s:
            ceilings.sample(3)
            played = player.play(weights, talk, setting.episodes, searcher=searcher_of(latency), seed=number)
            runs[latency].append(played.report(ceilings))
    for latency, rows in runs.items():
        ratio = statistics.median(row["tokens_per_s"] / none["tokens_per_s"] for row, none in zip(rows, runs[0.0]))
        row = {"run": f"search {latency * 1000:g} ms", "latency_ms": latency * 1000, "ratio": ratio} | medians(rows)
        yield finished(row | built | {"programs": player.programs}, ceilings)


# -- update -----------------------------------------------------------------------------------------------------------


def learner(setting: Setting, learns: str) -> Pupil:
    a = setting.architecture
    learns = learns or update.choose(a, memory_limit())
    return Pupil(a, start(a), learns, setting.questions * setting.group_size, setting.questions)


def updating(setting: Setting, ceilings: Ceilings, rounds: int, learns: str = "", profile: str = "") -> Iterator[Row]:
    """Gradients and a step on groups that nobody played. profile: folder for a trace of one more."""
    with compilations() as compiled:
        pupil = learner(setting, learns)
        made = update.packed(setting.learn.groups(setting.questions, setting.group_size), setting.rows, pupil.learns)
        pupil.learn(made)
    rows = []
    for _ in range(rounds):
        ceilings.sample(3)
        rows.append(pupil.report(made, pupil.learn(made), ceilings))
    with profiled(profile):
        if profile:
            pupil.learn(made)
    row = {"run": "update"} | medians(rows) | {"compile_s": compiled.seconds, "programs": most(pupil.programs)}
    yield finished(row, ceilings)


def most(programs: dict[str, int]) -> int:
    """Compilations of whichever program was compiled most often."""
    return max(programs.values())


def step(setting: Setting, ceilings: Ceilings, rounds: int, learns: str = "", profile: str = "") -> Iterator[Row]:
    """A whole step: weights laid out, episodes played in groups, packed, learned from; and how far the learner's
    log-probs are from the sampler's. profile: folder for a trace of one more."""
    a, episodes = setting.architecture, setting.questions * setting.group_size
    with compilations() as compiled:
        pupil = learner(setting, learns)
        # No shorter than the rollout's: where they are alike, it is the program that is compiled already.
        capacity = max(longest(setting), setting.learn.capacity)
        player = Player(a, beside(pupil, setting, capacity), capacity)
        first = whole(setting, player, pupil, ceilings, 0)
    rows = []
    for number in range(rounds):
        ceilings.sample(3)
        rows.append(whole(setting, player, pupil, ceilings, number + 1))
    with profiled(profile):
        if profile:
            whole(setting, player, pupil, ceilings, 0)
    # Sampler and learner have the same weights in every step, but for adapters, which the sampler does without.
    alike = [first] if pupil.learns == update.ADAPTERS else [first, *rows]
    worst = {name: max(row[name] for row in alike) for name in ("gap_mean", "gap_max")}
    programs = max(player.programs, most(pupil.programs))
    row = {"run": "step", "episodes": episodes} | medians(rows) | worst
    yield finished(row | {"compile_s": compiled.seconds, "programs": programs}, ceilings)


def beside(pupil: Pupil, setting: Setting, capacity: int) -> Sizes:
    """Sizes of the rollout beside a learner: the setting's, or where its pages would not fit, as many as are needed."""
    a, sizes = setting.architecture, setting.sizes
    learner_bytes = state_bytes(a, pupil.learns == update.ALL) if pupil.learns != update.ADAPTERS else 0
    cache = sizes.max_episodes * capacity * cache_bytes(a)
    if learner_bytes + cache < update.SPARE * memory_limit():
        return sizes
    return replace(sizes, max_episodes=setting.questions * setting.group_size)


def whole(setting: Setting, player: Player, pupil: Pupil, rates: Rates, seed: int) -> Row:
    """One step."""
    begin = time.perf_counter()
    plain = pupil.parameters.replace(adapters=None)  # type: ignore[attr-defined]
    weights = jax.block_until_ready(packed(setting.architecture, plain))
    laid = time.perf_counter()
    episodes = setting.questions * setting.group_size
    played = player.play(
        weights, setting.learn, episodes, group_size=setting.group_size, searcher=SlowSearcher(0.0), seed=seed,
        keep=True,
    )  # fmt: skip
    del weights  # the learner needs the room
    over = time.perf_counter()
    made = update.packed(played.groups, setting.rows, pupil.learns)
    ready = time.perf_counter()
    learned = pupil.learn(made)
    done = time.perf_counter()
    gradients, applied = pupil.work(made)
    floor_s = played.floor_s(rates) + gradients.seconds(rates) + applied.seconds(rates)
    return {
        "tokens_per_s": played.usage["tokens"] / (done - begin),
        "seconds": done - begin,
        "floor_s": floor_s,
        "share_of_floor": floor_s / (done - begin),
        "lay_out_s": laid - begin,
        "rollout_s": over - laid,
        "pack_s": ready - over,
        "update_s": done - ready,
        "sampled_tokens": played.usage["tokens"],
        "row_tokens": rows_of(made).tokens,
        "fill": made.fill,
        "learns": pupil.learns,
        "gap_mean": learned.metrics["sampler_learner_gap"],
        "gap_max": learned.metrics["sampler_learner_gap_max"],
    }


# -- what can be said beforehand --------------------------------------------------------------------------------------


def predicted(setting: Setting, rates: Rates, learns: str = "") -> Iterator[Row]:
    """Operations, bytes and floors of every phase, as they follow from shapes; nothing is allocated or run."""
    a, sizes = setting.architecture, setting.sizes
    together = sizes.prefill_rows * sizes.prefill_chunk

    def floors(run: str, **works: Any) -> Row:
        row: Row = {"run": run}
        for name, work in works.items():
            row |= {f"{name}_flops": work.flops, f"{name}_bytes": work.moved_bytes}
            row |= {f"{name}_floor_s": work.seconds(rates), f"{name}_bound": work.bound(rates)}
        return row | {"floor_s": sum(work.seconds(rates) for work in works.values())}

    def playing(workload: Workload, episodes: int, shared: float) -> dict[str, Any]:
        needed = volume([workload.episode(example.id) for example in workload.examples(episodes)])
        reading = prefilling(a, *read(needed, shared, episodes), together)
        return {"decode": decoding(a, needed, sizes.num_slots), "prefill": reading}

    yield floors("decode", **playing(setting.decode, sizes.num_slots, 0))
    yield floors("rollout", **playing(setting.talk, setting.episodes, 0))
    learns = learns or update.choose(a, memory_limit())
    made = update.packed(setting.learn.groups(setting.questions, setting.group_size), setting.rows, update.ALL)
    gradients = learning(a, rows_of(made), learns != update.ADAPTERS)
    yield floors(f"update ({learns})", update=gradients, apply=stepping(a, learns == update.ALL))
