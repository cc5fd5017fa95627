"""Reading compiled programs: what one device multiplies, what that moves through its memory, what it tells the others.

XLA's own analysis counts the body of a loop once. Here a loop counts as often as it runs, where the compiler knows how
often, and as often as it can run where its name says that (``kernels.loops``): an upper bound. Other loops that end
when the data say so are told apart, one turn of each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
BITS = {"pred": 8, "token": 0, "opaque": 0}  # of a number, where its name does not say it
CALLS = ("fusion", "call", "async-start", "conditional")  # what runs other computations, beside loops

Told = tuple[str, tuple[str, ...]]  # operation, mesh axes


@dataclass(frozen=True)
class Cost:
    """What one device does. Costs can be added and multiplied."""

    flops: float = 0.0  # of matrix products; what is done element by element is not counted
    traffic: float = 0.0  # bytes: operands and results of the products, each read or written once
    # Bytes a device sends, collectives as rings: (n - 1) / n of what is gathered, twice that of what is summed.
    sent: Mapping[Told, float] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        sent = {key: self.sent.get(key, 0.0) + other.sent.get(key, 0.0) for key in (*self.sent, *other.sent)}
        return Cost(self.flops + other.flops, self.traffic + other.traffic, sent)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.traffic * times, {key: each * times for key, each in self.sent.items()})

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1


@dataclass(frozen=True)
class Counted:
    """A program. loops: one turn of each loop of which nobody says how often it runs, in order."""

    once: Cost
    loops: tuple[Cost, ...] = ()


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # element types and sizes, as in f32[2,3]{1,0}, or several in parentheses
    operation: str
    operands: tuple[str, ...]
    rest: str  # the attributes


TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Of the loop itself, not of one that it stands in; transformations set the names that they find in parentheses.
MOST_TURNS = re.compile(r'op_name="(?:[^"]*[/(])?most_turns=(\d+)\)*/while"')
HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def read(text: str, mesh: Mapping[str, int]) -> Counted:
    """The cost of a compiled program. text: its HLO; mesh: sizes by axis, in order."""
    computations, entry = parse(text)

    @cache
    def visit(name: str) -> Counted:
        total, loops = Cost(), []
        types = {each.name: each.type for each in computations[name]}
        for each in computations[name]:
            if each.operation == "while":
                inner = [visit(part) for part in re.findall(r"(?:body|condition)=%?([\w.\-]+)", each.rest)]
                turn = sum((part.once + sum(part.loops, Cost()) for part in inner), Cost())
                turns = TURNS.search(each.rest) or MOST_TURNS.search(each.rest)
                if turns:
                    total += turn * int(turns[1])
                else:
                    loops.append(turn)
            elif each.operation in CALLS:
                inner = [visit(part) for part in called(each)]
                if each.operation == "conditional":  # of what may run, the most expensive
                    inner = [max(inner, key=lambda part: (part.once.flops, part.once.traffic))]
                for part in inner:
                    total, loops = total + part.once, [*loops, *part.loops]
            else:
                total += cost_of(each, types, mesh)
        return Counted(total, tuple(loops))

    return visit(entry)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, and the name of the one that the program begins with."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = HEAD.match(line)
        if head:
            current = computations[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := LINE.match(line)):
            name, type_, operation, rest = found.groups()
            operands, _, rest = rest.partition(")")
            current.append(Instruction(name, type_, operation, tuple(re.findall(r"%([\w.\-]+)", operands)), rest))
    return computations, entry


def called(each: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    branches = re.search(r"branch_computations=\{(.*?)\}", each.rest)
    if branches:
        return re.findall(r"[\w.\-]+", branches[1])
    return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", each.rest)


def cost_of(each: Instruction, types: Mapping[str, str], mesh: Mapping[str, int]) -> Cost:
    operation = each.operation.removesuffix("-start")
    if operation in COLLECTIVES:
        groups = groups_of(each)
        axes = axes_of(groups, mesh)
        return Cost(sent={(operation, axes): sent_bytes(operation, num_bytes(each.type), groups.shape[1])})
    if operation == "dot":
        ((_, left),) = shapes(types[each.operands[0]])
        ((_, out),) = shapes(each.type)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
        summed = math.prod(left[int(dim)] for dim in contracted[1].split(",") if dim) if contracted else 1
        moved = num_bytes(each.type) + sum(num_bytes(types[operand]) for operand in each.operands)
        return Cost(flops=2.0 * math.prod(out) * summed, traffic=moved)
    return Cost()


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and sizes of every array of a type."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", type_)
    return [(element, tuple(int(size) for size in sizes.split(",") if size)) for element, sizes in found]


def num_bytes(type_: str) -> int:
    def bits(element: str) -> int:
        return BITS[element] if element in BITS else int(re.findall(r"\d+", element)[0])

    return sum(math.prod(sizes) * bits(element) // 8 for element, sizes in shapes(type_))


# -- who talks to whom ------------------------------------------------------------------------------------------------


def sent_bytes(operation: str, result: int, group: int) -> float:
    """Bytes a device sends for a result of so many bytes a device, in a ring of `group` devices."""
    if operation == "reduce-scatter":
        return float(result * (group - 1))
    if operation.startswith("collective"):
        return float(result)
    return (2.0 if operation == "all-reduce" else 1.0) * result * (group - 1) / group


def groups_of(each: Instruction) -> np.ndarray:
    """The devices that talk with each other: [groups, devices]. Three spellings: lists, a transposed range, and axes of
    a mesh, of which an axis may be named in part ('axis':(before)size)."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", each.rest)
    lists = pairs or re.search(r"replica_groups=\{(\{.*?\})\}", each.rest)
    if lists:
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", lists[1])])
    spelled = re.search(r"replica_groups=(\[.*?\]<=\[[\d,]+\](?:T\([\d,]+\))?)", each.rest)
    if spelled:
        final, _, order = spelled[1].partition("<=")
        return transposed(order).reshape([int(n) for n in final.strip("[]").split(",")])
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", each.rest)
    if named is None:
        raise ValueError(f"the groups of {each.name} are spelled in an unknown way: {each.rest[:100]}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    chosen = {axis: part for axis, part in re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", named[3])}
    shape: list[tuple[int, bool]] = []  # sizes, and whether the devices of a group differ there
    for axis, size in sizes.items():
        if chosen.get(axis):
            before, part = (int(n) for n in re.findall(r"\d+", chosen[axis]))
            shape += [(before, False), (part, True), (size // before // part, False)]
        else:
            shape.append((size, axis in chosen))
    devices = transposed(named[2] or f"[{math.prod(sizes.values())}]").reshape([size for size, _ in shape])
    inside = [place for place, (_, differ) in enumerate(shape) if differ]
    outside = [place for place, (_, differ) in enumerate(shape) if not differ]
    return devices.transpose(outside + inside).reshape(-1, math.prod(shape[place][0] for place in inside))


def transposed(order: str) -> np.ndarray:
    """Devices in an order that is written [sizes]T(dims): a range laid out in those sizes and transposed; or listed."""
    sizes = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order.removeprefix("("))
    if sizes is None:
        return np.array([int(n) for n in re.findall(r"\d+", order)])
    shape = [int(n) for n in sizes[1].split(",")]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose([int(n) for n in sizes[2].split(",")]) if sizes[2] else devices


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())
