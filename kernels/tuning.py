"""Choosing tiles: every candidate of every accelerator kernel is timed, the best is written to ``tiles.json``.

A module that can be tiled has ``TILES``: by operation, as it looks them up in the table, the candidates,
``{"log_prob fwd": ({"block_n": 128}, ...)}``. A candidate is tried by answering the look-ups of one trace with it.
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
from kernels.bench_cases import cases, optional
from kernels.ceilings import Ceilings
from kernels.log_prob import api as log_prob_api
from kernels.measurement import Case, measure
from kernels.uncertainty import api as uncertainty_api

Asked = set[tuple[str, str]]  # operation and bucket


class Answers(dict):
    """In place of the table of one kind of device: answers `operation` with one candidate and notes what was asked."""

    def __init__(self, table: Mapping[str, Any], operation: str, candidate: Mapping[str, int]):
        super().__init__(table)
        self.operation, self.candidate, self.asked = operation, candidate, set()

    def get(self, operation: str, default: Any = None) -> Any:  # type: ignore[override]
        return Buckets(self, operation, super().get(operation, {}))


class Buckets(dict):
    """In place of the buckets of one operation."""

    def __init__(self, answers: Answers, operation: str, table: Mapping[str, Any]):
        super().__init__(table)
        self.answers, self.operation = answers, operation

    def get(self, bucket: str, default: Any = None) -> Any:  # type: ignore[override]
        self.answers.asked.add((self.operation, bucket))
        if self.operation == self.answers.operation:
            return {"tiles": self.answers.candidate}
        return super().get(bucket, default)


@contextlib.contextmanager
def answered(operation: str, candidate: Mapping[str, int]) -> Iterator[Asked]:
    """Look-ups of `operation` on this device find the candidate; what is looked up is noted."""
    read, kind = tiles.read, tiles.device_kind()
    answers = Answers(read().get(kind, {}), operation, candidate)
    tiles.read = lambda: {**read(), kind: answers}
    try:
        yield answers.asked
    finally:
        tiles.read = read


def tileable(platform: str) -> dict[str, dict[str, ModuleType]]:
    """Operation of the bench -> implementation -> module with TILES, of what runs on a platform."""
    apis = {"log_prob": log_prob_api, "uncertainty": uncertainty_api, "advantage": advantage_api}
    apis["decode_attention"] = optional("kernels.decode_attention.api")
    found: dict[str, dict[str, ModuleType]] = {}
    for operation, api in apis.items():
        for name, entry in (api.IMPLEMENTATIONS if api else {}).items():
            module = entry.run if isinstance(entry.run, ModuleType) else sys.modules[entry.run.__module__]
            if platform in entry.platforms and hasattr(module, "TILES"):
                found.setdefault(operation, {})[name] = module
    return found


def tune(only: Sequence[str], size: str, repeats: int, ceilings: Ceilings) -> str:
    """Time all candidates at the cases of a size, write the best, and say in one line what was done."""
    platform = dispatch.current_platform()
    able = {operation: own for operation, own in tileable(platform).items() if operation in only}
    if not able:
        return f"nothing to tune: no implementation of {', '.join(only)} that runs on {platform} has tiles"
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases(size, platform, tuple(able)):
        for name, module in able[case.operation.split()[0]].items():
            for operation, candidates in module.TILES.items():
                best |= tuned(case, name, operation, candidates, repeats, ceilings, best)
    write(best)
    return f"{len(best)} entries written to {tiles.PATH.name} for {tiles.device_kind()}"


def tuned(
    case: Case, name: str, operation: str, candidates: Sequence[Mapping[str, int]], repeats: int, ceilings: Ceilings,
    known: Mapping[tuple[str, str], Any],
) -> dict[tuple[str, str], dict[str, Any]]:  # fmt: skip
    """The best of the candidates in one case, by what it looked up; {} where it looked up nothing that is not known."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    function = case.functions[name]
    functions = {name: function} if case.against == name else {case.against: case.functions[case.against]}
    for candidate in candidates:
        with answered(operation, candidate) as asked:
            # A new function each time: a trace that is known would not look anything up.
            trial = case._replace(functions={**functions, name: lambda *arguments: function(*arguments)})
            row = {row.implementation: row for row in measure(trial, repeats, ceilings)}[name]
        places = {place for place in asked if place[0] == operation and place not in known}
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


def write(best: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Into the table, over what it says of the same places on this kind of device."""
    table = json.loads(tiles.PATH.read_text())
    own = table.setdefault(tiles.device_kind(), {})
    for (operation, bucket), entry in best.items():
        own.setdefault(operation, {})[bucket] = entry
    tiles.PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    tiles.read.cache_clear()
