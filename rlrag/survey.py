"""What a training needs and does, surveyed on a few small compilations, so that any size of it can be calculated.

- Bytes are affine in update.micro_rows and rollout.num_slots: two compilations give the line.
- Decoding is unrolled over layers: costs and bytes are affine in them from the second layer on (prefill leaves most of
  the last one out), so a deep model is compiled at two small depths. The update scans its layers and is compiled as
  deep as it is. Prefill and decoding are surveyed apart: the larger of the two is what the round needs.

All of it is compiled for virtual CPU devices, and bfloat16 is where that misleads: the CPU's compiler has no bfloat16
products, widens their operands and tells float32 to the other devices. An accelerator has them. So for accelerators
the programs are compiled in float16 in place of bfloat16, which is as wide, with the passes switched off that would
widen it too. A toy step of four layers on 4 x 2 devices then needs 133 MiB where the CPU's own bfloat16 needs 143 and
float32 158 (attention scores, float32 in all three, are most of it), a round 0.9 MiB, 60 and 1.6; what devices tell
each other is half as wide as in float32, but for sums that are float32 on purpose. What a layer adds is what is
calculated by hand, to 2 % (tests/test_survey.py). That accelerators fuse and lay out otherwise than the CPU remains:
no accelerator has been held against this yet.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from kernels.decode_attention import blocked
from kernels.log_prob import api as log_prob
from rlrag.dry_run import Account, Setting, account, compile_all, lower_rollout, lower_update
from rlrag.hlo import Cost, Counted, read
from rlrag.mesh import num_shards, partition
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import num_parameters
from rlrag.rollout.advance import PAGES

# Passes of the CPU's compiler that turn float16 into float32.
WIDENING = "change-op-data-type,float-normalization-f16,operand_upcaster,simplify-fp-conversions"
FIRST_DEPTH = 2  # from here on costs are affine in layers


class Half(Architecture):
    """An architecture in float16: bfloat16's width, in a type that the CPU's compiler knows. Never run."""

    def check(self) -> None:
        """Says nothing: float16 is no type to train in."""


@dataclass(frozen=True)
class Line:
    """base + rows * micro_rows + slots * num_slots."""

    base: float
    rows: float = 0.0
    slots: float = 0.0

    def at(self, rows: int, slots: int) -> int:
        return round(self.base + self.rows * rows + self.slots * slots)


@dataclass(frozen=True)
class Survey:
    """Bytes a device, and costs of one run of each program.

    costs: pack (once a step), prefill (a chunk), decode (a step of the burst), prepare (less its scoring), score (one
    pass over a micro-batch), accumulate, apply.
    """

    parameters: Mapping[str, int]  # by model
    mesh: Mapping[str, int]  # sizes by axis, in order
    rows: int  # as configured
    slots: int
    shards: int  # whose multiples rows and slots are
    stays: Mapping[str, Line]
    beside: Mapping[str, Line]
    needed: Mapping[str, Line]  # by program, for itself
    costs: Mapping[str, Cost]
    passes: int  # scoring passes over each micro-batch
    whole: tuple[str, ...]  # what an axis of the mesh does not divide, and so lies whole on its devices
    compilations: int

    def account(self, rows: int, slots: int) -> Account:
        stays, beside = ({k: line.at(rows, slots) for k, line in lines.items()} for lines in (self.stays, self.beside))
        return Account(stays, beside)

    def temporary(self, rows: int, slots: int) -> dict[str, int]:
        """Bytes while each program runs, with what stands beside it."""
        found = self.account(rows, slots)
        return {name: line.at(rows, slots) + found.beside_program(name) for name, line in self.needed.items()}

    def peak(self, rows: int, slots: int) -> int:
        stays = self.account(rows, slots).stays
        return sum(stays.values()) + max(self.temporary(rows, slots).values())


def survey(setting: Setting, native: bool) -> Survey:
    """native: for this machine's own CPU, as it compiles; otherwise for accelerators."""
    compiler = Compiler(native, dict(setting.mesh.shape))
    setting = setting if native else accelerated(setting)
    with nullcontext() if native else as_accelerators():
        rows, slots = setting.stage.settings.update.micro_rows, setting.spec.num_slots
        doubled = setting.resized(rows=2 * rows)
        stays, beside = accounts(setting, doubled, setting.resized(slots=2 * slots), native)
        update, again = compiler.update(setting), compiler.update(doubled, apply=False)
        needed = {name: over(rows, one.needed, again.get(name, one).needed, "rows") for name, one in update.items()}
        rollout = compiler.rollout(setting)
        needed |= rollout.needed
        costs = {**rollout.costs, **update_costs(update, beside["gradients"].base)}
        programs, mesh = setting.programs, setting.mesh
        return Survey(
            parameters={name: num_parameters(own) for name, own in programs.architectures.items()},
            mesh=dict(mesh.shape), rows=rows, slots=slots, shards=num_shards(mesh), stays=stays, beside=beside,
            needed=needed, costs=costs, passes=passes(setting, update["prepare"].counted),
            whole=undivided(setting.a, mesh),
            compilations=compiler.compilations,
        )  # fmt: skip


def accelerated(setting: Setting) -> Setting:
    """As an accelerator plays and learns it."""
    return replace(setting, a=halved(setting.a), spec=replace(setting.spec, decode=PAGES))


def halved(a: Architecture) -> Architecture:
    own: dict[str, Any] = {field.name: getattr(a, field.name) for field in fields(Architecture)}
    own |= {name: "float16" for name in ("dtype", "param_dtype") if own[name] == "bfloat16"}
    return Half(**own)


@contextmanager
def as_accelerators() -> Iterator[None]:
    """Logits and cached tokens in chunks as accelerators take them, where the CPU's sizes would be chosen."""
    own, blocks = dict(log_prob.CHUNK_BYTES), dict(blocked.BLOCK_TOKENS)
    log_prob.CHUNK_BYTES.clear()
    blocked.BLOCK_TOKENS.clear()
    try:
        yield
    finally:
        log_prob.CHUNK_BYTES.update(own)
        blocked.BLOCK_TOKENS.update(blocks)


def undivided(a: Architecture, mesh: Any) -> tuple[str, ...]:
    sizes = {"heads": a.num_heads, "kv_heads": a.num_kv_heads, "mlp": a.mlp_dim, "vocab": a.vocab_size}
    sizes["embed"] = a.embed_dim
    return tuple(
        f"{name} {size}" for name, size in sizes.items() if partition((name,)) != partition((name,), (size,), mesh)
    )


def accounts(setting: Setting, more_rows: Setting, more_slots: Setting, native: bool) -> tuple[dict, dict]:
    """Lines of what stays and of what stands beside programs."""
    here, rows, slots = account(setting), account(more_rows), account(more_slots)
    num_rows, num_slots = setting.stage.settings.update.micro_rows, setting.spec.num_slots

    def lines(kind: Callable[[Account], Mapping[str, int]]) -> dict[str, Line]:
        found = {}
        for name, value in kind(here).items():
            by_row, by_slot = (kind(rows)[name] - value) / num_rows, (kind(slots)[name] - value) / num_slots
            found[name] = Line(value - by_row * num_rows - by_slot * num_slots, by_row, by_slot)
        return found

    stays = lines(lambda each: each.stays)
    if not native:
        del stays["process"]  # is the host's
    return stays, lines(lambda each: each.beside)


@dataclass(frozen=True)
class Compiled:
    needed: int
    passed: int  # bytes of arguments and results
    counted: Counted


@dataclass(frozen=True)
class Rollout:
    needed: Mapping[str, Line]
    costs: Mapping[str, Cost]


class Compiler:
    """Compiles one program at a time and counts."""

    def __init__(self, native: bool, mesh: Mapping[str, int]):
        self.options = None if native else {"xla_disable_hlo_passes": WIDENING}
        self.mesh, self.compilations = mesh, 0

    def compile(self, lowered: Mapping[str, Any]) -> dict[str, Compiled]:
        compiled, _ = compile_all(lowered, self.options, threads=1)
        self.compilations += len(compiled)
        found = {}
        for name, program in compiled.items():
            memory = program.memory_analysis()
            passed = memory.argument_size_in_bytes + memory.output_size_in_bytes
            found[name] = Compiled(memory.temp_size_in_bytes, passed, read(program.as_text(), self.mesh))
        return found

    def update(self, setting: Setting, apply: bool = True) -> dict[str, Compiled]:
        """apply: too; it has nothing to do with rows."""
        lowered = lower_update(setting.programs, setting.stage, setting.mesh)
        return self.compile({name: each for name, each in lowered.items() if apply or not name.startswith("apply")})

    def rollout(self, setting: Setting) -> Rollout:
        """Prefill without decoding to speak of, decoding without prefill to speak of; each at two depths."""
        spec, shards = setting.spec, num_shards(setting.mesh)
        slots = spec.num_slots
        few = replace(setting, spec=replace(spec, num_slots=shards, burst=1))
        short = replace(setting, spec=replace(spec, prefill_rows=shards, prefill_chunk=1, prefill_chunks=1))
        deep, whole = self.at_depth, setting.a.num_layers
        prefill = deep(few, whole)
        decode = deep(short, whole, packs=False), deep(short.resized(slots=2 * slots), whole, packs=False)
        needed = {"pack": Line(prefill["pack"].needed), "prefill": Line(prefill["advance"].needed)}
        needed["decode"] = over(slots, decode[0]["advance"].needed, decode[1]["advance"].needed, "slots")
        pack = prefill["pack"]
        return Rollout(
            needed,
            {
                "pack": replace(pack.counted.once, traffic=pack.passed),
                "prefill": rollout_loops(prefill["advance"].counted)[0],
                "decode": rollout_loops(decode[0]["advance"].counted)[1],
            },
        )

    def at_depth(self, setting: Setting, layers: int, packs: bool = True) -> dict[str, Compiled]:
        """The rollout's programs at a depth, extrapolated from two small ones where it is larger."""
        period = len(setting.a.pattern) if len(set(setting.a.pattern)) > 1 else 1
        first = FIRST_DEPTH + (layers - FIRST_DEPTH) % period
        second = first + period

        def at(depth: int) -> dict[str, Compiled]:
            lowered = lower_rollout(setting.resized(layers=depth))
            return self.compile({name: program for name, program in lowered.items() if packs or name != "pack"})

        if layers <= second:
            return at(layers)
        one, two = at(first), at(second)
        reach = partial(extrapolated, times=(layers - first) / period)
        return {name: along(one[name], two[name], reach) for name in one}


def extrapolated(first: Any, second: Any, times: float) -> Any:
    return first + (second - first) * times


def along(one: Compiled, two: Compiled, reach: Callable[[Any, Any], Any]) -> Compiled:
    loops = tuple(reach(*pair) for pair in zip(one.counted.loops, two.counted.loops, strict=True))
    counted = Counted(reach(one.counted.once, two.counted.once), loops)
    return Compiled(round(reach(one.needed, two.needed)), round(reach(one.passed, two.passed)), counted)


def over(count: int, value: float, doubled: float, what: str) -> Line:
    """The line through the values at count and at twice that."""
    slope = (doubled - value) / count
    return replace(Line(value - slope * count), **{what: slope})


def rollout_loops(counted: Counted) -> tuple[Cost, Cost]:
    """A chunk of prefill, a step of decoding. On lanes streams enter them in between, and of a step's attention one
    tile is counted."""
    if len(counted.loops) not in (2, 3):
        raise AssertionError(f"the round has {len(counted.loops)} loops of its own, not prefill's and decoding's")
    return counted.loops[0], counted.loops[-1]


def update_costs(update: Mapping[str, Compiled], gradients: float) -> dict[str, Cost]:
    prepare = update["prepare"].counted
    costs = {"prepare": prepare.once}
    if prepare.loops:
        costs["score"] = sum(prepare.loops, Cost()) * (1 / len(prepare.loops))
    for kind in ("accumulate", "apply"):
        total = Cost()
        for name, one in update.items():
            if name.startswith(kind):
                # Gradients are read and written; an optimizer reads and writes all it is given.
                total += one.counted.once + Cost(traffic=2 * gradients if kind == "accumulate" else one.passed)
        costs[kind] = total
    return costs


def passes(setting: Setting, prepare: Counted) -> int:
    """Scoring passes that prepare makes over every micro-batch; those for forced tokens alone are not made."""
    objectives = [learn.objective for learn in setting.stage.recipe.learn.values()]
    idle = sum("old_logp" in each.needs and not each.recompute_old for each in objectives)
    return max(0, len(prepare.loops) - idle)
