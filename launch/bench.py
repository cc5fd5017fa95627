"""Speed of a rollout, of an update, of a whole step, against their floors: python -m launch.bench --shape=demo

Weights are random, lengths forced. Beside every time stands the least it could be: the phase's operations and bytes
(rlrag/speed/floor.py) at the rates of a bare matrix product and of the memory, measured in between the runs. Runs are
interleaved; numbers are medians over rounds, ratios are taken within each round. docs/guides/speed.md says what the
rows mean.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

SHAPES = ("demo", "qwen2.5-0.5b", "3b", "7b")
PHASES = ("rollout", "update", "step")
# What is held against less -> the phase that it is of.
AGAINST = {"fixed_batch": "rollout", "no_sharing": "rollout", "padded": "update"}
# Sizes that a shape brings (rlrag/speed/shapes.py), each of which can be given: 0 leaves it as it is.
CHANGES = {
    "num_slots": "Decode lanes.",
    "max_episodes": "Episodes in flight at once, waiting ones included.",
    "burst": "Decode steps a round at most.",
    "page_size": "Tokens of a page of the cache.",
    "prefill_rows": "Streams whose appended tokens are read at once.",
    "prefill_chunk": "Tokens of each of them that are.",
    "prefill_chunks": "Such chunks a round at most.",
    "episodes": "Episodes of a run with searches, and of --against.",
    "turns": "Generations of such an episode.",
    "turn_tokens": "Mean tokens of a generation: between half and one and a half of it.",
    "document_tokens": "Tokens of what a search returns.",
    "prompt_tokens": "Tokens of the prompt.",
    "decode_tokens": "Tokens of every episode of the run that only decodes.",
    "questions": "Groups of an update.",
    "micro_rows": "Rows of a micro-batch.",
    "row_tokens": "Tokens of a row.",
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_enum("shape", "demo", (*SHAPES, "qwen2.5-3b", "qwen2.5-7b"), "Of the model.", flag_values=values)
    flags.DEFINE_list("phase", ["rollout"], f"What is timed: some of {', '.join(PHASES)}.", flag_values=values)
    flags.DEFINE_enum(
        "against", None, list(AGAINST), "What a rollout, or an update (padded), is held against instead.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("search_ms", ["200"], "Latencies of searches, beside none at all.", flag_values=values)
    flags.DEFINE_bool("server", False, "Search through a server, which adds the latencies itself.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Repetitions of every run.", flag_values=values)
    flags.DEFINE_integer("layers", 0, "Of the model that are kept; 0: all.", flag_values=values)
    flags.DEFINE_integer("scale", 1, "Divisor of its widths and vocabulary.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "", ("", "float32", "bfloat16"), "Of weights and activations; empty: as published, float32 on CPU.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "learns", "", ("", "all", "gradients", "adapters"),
        "What an update changes; gradients: without a step of the optimizer; empty: the first that fits the memory.",
        flag_values=values,
    )  # fmt: skip
    for name, text in CHANGES.items():
        flags.DEFINE_integer(name, 0, f"{text} 0: the shape's own.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("predict", False, "Operations, bytes and floors alone: nothing is played.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Ceilings of small probes, for tests.", flag_values=values)
    flags.DEFINE_string(
        "profile", "", "Folder for a trace of one more round, for xprof and Perfetto.", flag_values=values
    )
    flags.DEFINE_string("out", "", "File for the figures as JSON, written as they come.", flag_values=values)


def main(f: flags.FlagValues) -> None:
    from launch.flags import Mistake

    try:
        latencies = [0.0, *(float(text) / 1000 for text in f.search_ms if float(text))]
    except ValueError:
        raise Mistake(f"--search_ms is {','.join(f.search_ms)}: give milliseconds, as in --search_ms=50,200") from None
    if f.profile and (f.against or f.predict):
        raise Mistake("--profile is of a phase: leave --against and --predict out")
    if wrong := [phase for phase in f.phase if phase not in PHASES]:
        raise Mistake(f"--phase has {wrong[0]!r}: give some of {','.join(PHASES)}")
    if f.against and f.phase != [AGAINST[f.against]]:
        raise Mistake(f"--against={f.against} is of --phase={AGAINST[f.against]}, not {','.join(f.phase)}")
    from kernels import ceilings
    from kernels.dispatch import chosen
    from rlrag.speed.machine import described

    setting = setting_of(f)
    own = ceilings.open_ceilings(setting.architecture.dtype, ceilings.QUICK if f.quick else None)
    own.sample(3)
    found = described(f"python -m launch.bench {' '.join(sys.argv[1:])}") | {"shape": f.shape, "rows": []}
    print(f"# {found['date']}  {found['device']}  JAX {found['jax']}  {found['command']}")
    for row in rows(f, setting, own, latencies):
        found["rows"].append(row)
        found["kernels"] = chosen()
        if f.out:
            Path(f.out).write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found["rows"])))
    if f.profile:
        print(f"trace written to {f.profile}")
    if any("error" in row for row in found["rows"]):
        sys.exit(1)


def rows(f: flags.FlagValues, setting, own, latencies: Sequence[float]) -> Iterator[dict[str, Any]]:
    from rlrag.speed import comparisons, phases

    if f.predict:
        yield from phases.predicted(setting, own, f.learns)
    elif f.against:
        compare = {
            "fixed_batch": comparisons.fixed_batches, "no_sharing": comparisons.sharing, "padded": comparisons.padding,
        }  # fmt: skip
        yield from compare[f.against](setting, own, f.rounds)
    else:
        for phase in f.phase:
            try:
                yield from rows_of(phase, f, setting, own, latencies)
            except Exception as error:
                if len(f.phase) == 1:
                    raise
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"{phase} failed: {told}", file=sys.stderr)
                yield {"run": phase, "error": told}


def rows_of(phase: str, f: flags.FlagValues, setting, own, latencies: Sequence[float]) -> Iterator[dict[str, Any]]:
    from rlrag.speed import phases
    from rlrag.speed.searching import searchers

    if phase == "rollout":
        with searchers(latencies, f.server) as searcher_of:
            yield from phases.rollout(setting, own, latencies, searcher_of, f.rounds, f.profile)
    else:
        timed = phases.updating if phase == "update" else phases.step
        yield from timed(setting, own, f.rounds, f.learns, f.profile)


def setting_of(f: flags.FlagValues):
    import jax

    from rlrag.speed import shapes

    setting = shapes.demo() if f.shape == "demo" else shapes.published(architecture(f.shape))
    dtype = f.dtype or ("float32" if jax.default_backend() == "cpu" else "")
    changes: dict[str, Any] = {name: f[name].value for name in CHANGES}
    return shapes.changed(setting, layers=f.layers, scale=f.scale, dtype=dtype, changes=changes)


def architecture(shape: str):
    from configs.scale import COMMON, VARIANTS
    from rlrag.model.architecture import Architecture

    size = VARIANTS[shape if shape.startswith("qwen") else f"qwen2.5-{shape}"]._asdict()
    common = {name: getattr(COMMON, name) for name in ("qkv_bias", "rope_theta", "norm_epsilon", "remat")}
    common |= {"dtype": COMMON.dtype, "param_dtype": COMMON.param_dtype}
    return Architecture(**common, **{name: value for name, value in size.items() if name != "mesh"})


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A column for each run, a line for each number."""
    from rlrag.speed.findings import number

    names = dict.fromkeys(name for row in found for name in row if name != "run")
    width = max(14, *(len(row["run"]) + 2 for row in found))
    yield f"{'':<20}" + "".join(f"{row['run']:>{width}}" for row in found)
    for name in names:
        yield f"{name:<20}" + "".join(f"{number(row.get(name)):>{width}}" for row in found)


if __name__ == "__main__":
    from launch.flags import run

    run(main, define_flags, doc=__doc__)
