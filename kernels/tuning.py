"""Choosing tiles: every candidate of every accelerator kernel is timed, the best is written to ``tiles.json``.

A module that can be tiled has ``TILES``, its candidates: ``({"block_n": 128}, {"block_n": 256})``. A candidate is tried
by answering all look-ups of one trace with it; what was looked up says where in the table the best belongs.
"""

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from kernels import dispatch, tiles
from kernels.advantage import api as advantage_api
from kernels.bench_cases import cases
from kernels.ceilings import Ceilings
from kernels.decode_attention import api as decode_attention_api
from kernels.log_prob import api as log_prob_api
from kernels.measurement import Case, measure
from kernels.uncertainty import api as uncertainty_api

Asked = set[tuple[str, str]]  # operation and bucket
Best = dict[tuple[str, str], dict[str, Any]]  # operation and bucket -> entry of the table


class Answers(dict):
    """In place of the table of one kind of device: answers with one candidate, and notes what was asked."""

    def __init__(self, candidate: Mapping[str, int]):
        super().__init__()
        self.candidate, self.asked = candidate, set()

    def get(self, operation: str, default: Any = None) -> Any:  # type: ignore[override]
        return Buckets(self, operation)


class Buckets(dict):
    """In place of the buckets of one operation."""

    def __init__(self, answers: Answers, operation: str):
        super().__init__()
        self.answers, self.operation = answers, operation

    def get(self, bucket: str, default: Any = None) -> Any:  # type: ignore[override]
        self.answers.asked.add((self.operation, bucket))
        return {"tiles": self.answers.candidate}


@contextlib.contextmanager
def answered(candidate: Mapping[str, int]) -> Iterator[Asked]:
    """Look-ups on this device find the candidate; what is looked up is noted."""
    read, answers = tiles.read, Answers(candidate)
    tiles.read = lambda: {tiles.device_kind(): answers}  # type: ignore[assignment]
    try:
        yield answers.asked
    finally:
        tiles.read = read


def tileable(platform: str) -> dict[str, dict[str, ModuleType]]:
    """Operation of the bench -> implementation -> module with TILES, of what runs on a platform."""
    apis = {
        "log_prob": log_prob_api, "uncertainty": uncertainty_api, "advantage": advantage_api,
        "decode_attention": decode_attention_api,
    }  # fmt: skip
    found: dict[str, dict[str, ModuleType]] = {}
    for operation, api in apis.items():
        for name, entry in api.IMPLEMENTATIONS.items():
            module = module_of(entry)
            if platform in entry.platforms and hasattr(module, "TILES"):
                found.setdefault(operation, {})[name] = module
    return found


def module_of(entry: dispatch.Implementation) -> ModuleType:
    """That holds the implementation: of what a partial function is given, where it is given functions."""
    if isinstance(entry.run, ModuleType):
        return entry.run
    functions = [each for each in getattr(entry.run, "args", ()) if callable(each)]
    function = functions[0] if functions else getattr(entry.run, "func", entry.run)
    return sys.modules[function.__module__]


def tune(only: Sequence[str], size: str, repeats: int, ceilings: Ceilings) -> str:
    """Time all candidates at the cases of a size, write the best, and say in one line what was done."""
    platform = dispatch.current_platform()
    able = {operation: own for operation, own in tileable(platform).items() if operation in only}
    if not able:
        return f"nothing to tune: no implementation of {', '.join(only)} that runs on {platform} has tiles"
    best: Best = {}
    for case in cases(size, platform, tuple(able)):
        for name, module in able[case.operation.split()[0]].items():
            # Of an operation with a gradient the two together decide: they share their entry of the table.
            if not case.operation.endswith(" fwd"):
                best |= tuned(case, name, module.TILES, repeats, ceilings, best)
    write(best)
    return f"{len(best)} entries written to {tiles.PATH.name} for {tiles.device_kind()}"


def tuned(
    case: Case, name: str, candidates: Sequence[Mapping[str, int]], repeats: int, ceilings: Ceilings, known: Best
) -> Best:
    """The best of the candidates in one case; {} where all that it looks up is known."""
    found: Best = {}
    function, right = case.functions[name], {case.against: case.functions[case.against]}
    for candidate in candidates:
        with answered(candidate) as asked:
            # A new function each time: a trace that is known would not look anything up.
            trial = case._replace(functions=right | {name: lambda *arguments: function(*arguments)})
            row = {row.implementation: row for row in measure(trial, repeats, ceilings)}[name]
        places = {place for place in asked if place not in known}
        told = f"failed: {row.error}" if row.error else f"{row.median_s * 1e3:.3f} ms"
        print(f"{case.operation} {name} {dict(candidate)} {told}  {case.shape}", flush=True)
        for place in places:
            if not row.error and (place not in found or row.median_s < found[place]["time_s"]):
                date = datetime.date.today().isoformat()
                entry = {"tiles": dict(candidate), "time_s": row.median_s, "jax": jax.__version__, "date": date}
                found[place] = entry
        if not places:
            break
    return found


def write(best: Best) -> None:
    """Into the table, over what it says of the same places on this kind of device."""
    table = json.loads(tiles.PATH.read_text())
    own = table.setdefault(tiles.device_kind(), {})
    for (operation, bucket), entry in best.items():
        own.setdefault(operation, {})[bucket] = entry
    tiles.PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    tiles.read.cache_clear()
