"""Ragged trajectories to packed rows, and per-token results back. Host, numpy.

Streams of one group that begin with the same observed tokens share them in a row: the prompt's segment once, the
samples as its children. The shared part stops one token short of the common prefix: every child repeats that token
itself, so that the column before a trained token always belongs to its own segment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from rlrag.batch import Batch, Segments
from rlrag.rewards.paid import Paid
from rlrag.trajectory import FAILED, OBSERVED, SAMPLED, SEARCH_FAILED, Group, Stream

LEFT_OUT = (SEARCH_FAILED, FAILED)  # these episodes are counted and shown, and never learned from
NEGLIGIBLE = 8  # shared prefixes shorter than this cost more bookkeeping than they save


@dataclass(frozen=True)
class Shape:
    """Static sizes of a packed batch: up to `max_micro` micro-batches of `rows` rows of `tokens` tokens."""

    rows: int
    tokens: int
    max_segments: int  # per row, padding's entry included
    max_micro: int
    num_kept: int
    num_rewards: int
    num_adapters: int = 0

    def __post_init__(self):
        if self.max_segments < 2:
            raise ValueError(f"update.max_segments is {self.max_segments}: give 2 or more, the first is padding's")
        for name in ("rows", "tokens", "max_micro"):
            if getattr(self, name) < 1:
                raise ValueError(f"a packed batch has {name} {getattr(self, name)}: give a positive number")


@dataclass(slots=True)
class Item:
    """One stream to place."""

    stream: Stream
    episode: int
    call: int
    group: int
    version: int
    rewards: np.ndarray  # [R], nan = not paid
    adapter: int | None  # number of the one that speaks; None: the base
    bonus: np.ndarray | None


@dataclass(slots=True, eq=False)
class Family:
    """Streams that go into rows with `shared` tokens in common (0: none)."""

    items: list[Item]
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens [start, start + count) of a stream lie."""

    episode: int
    call: int
    row: int  # over all micro-batches
    column: int
    start: int
    count: int


@dataclass(frozen=True)
class Packed:
    batch: Batch  # leaves [M, R, ...], numpy
    num_micro: int
    places: list[Place]  # of streams; shared prefixes are not listed
    fill: float  # share of the used rows' columns that hold tokens
    num_groups: int
    num_episodes: int
    left_out: int  # episodes not packed


def empty_rows(shape: Shape) -> Batch:
    """Padding alone: leaves [M * R, ...], numpy, on the way to the device."""
    num_rows, T, S = shape.rows * shape.max_micro, shape.tokens, shape.max_segments

    def tokens(dtype: type, value: float = 0, *more: int) -> Any:
        return np.full((num_rows, T, *more), value, dtype)

    def segments(dtype: type, value: float = 0, *more: int) -> Any:
        return np.full((num_rows, S, *more), value, dtype)

    ints, floats = np.int32, np.float32
    return Batch(
        tokens=tokens(ints), segment=tokens(ints), positions=tokens(ints), turn=tokens(ints), role=tokens(ints),
        tags=tokens(ints), act=tokens(ints), kept=tokens(ints, -1, shape.num_kept), temperature=tokens(floats, 1),
        logp=tokens(floats), entropy=tokens(floats), certainty=tokens(floats), bonus=tokens(floats),
        weight=tokens(floats), old_logp=tokens(floats), ref_logp=tokens(floats),
        value=tokens(floats), target=tokens(floats),
        segments=Segments(
            episode=segments(ints, -1), call=segments(ints), group=segments(ints, -1),
            parent=segments(ints), version=segments(ints),
            adapters=segments(floats, 0, shape.num_adapters) if shape.num_adapters else None,
            rewards=segments(floats, 0, shape.num_rewards), valid=segments(bool, False, shape.num_rewards),
        ),
    )  # fmt: skip


def empty_batch(shape: Shape) -> Batch:
    """Padding alone: leaves [M, R, ...], numpy."""
    return by_micro_batch(empty_rows(shape), shape)


def by_micro_batch(rows: Batch, shape: Shape) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape(shape.max_micro, shape.rows, *leaf.shape[1:]), rows)


class _Rows:
    """The arrays being filled."""

    def __init__(self, shape: Shape):
        self.shape = shape
        num_rows = shape.rows * shape.max_micro
        self.length = np.zeros(num_rows, np.int32)  # columns used
        self.count = np.ones(num_rows, np.int32)  # segments used; 0 is padding
        self.batch = empty_rows(shape)

    def segment(self, row: int, parent: int = 0) -> int:
        number = int(self.count[row])
        self.count[row] += 1
        self.batch.segments.parent[row, number] = parent
        return number

    def write(self, row: int, segment: int, item: Item, start: int, stop: int, roles: Mapping[str, int]) -> int:
        """Lay tokens [start, stop) of a stream down; returns their first column."""
        b, column = self.batch, int(self.length[row])
        where = slice(column, column + stop - start)
        b.segment[row, where] = segment
        b.positions[row, where] = np.arange(start, stop)
        at, turn = 0, 0
        for span in item.stream.spans:
            low, high = max(at, start), min(at + len(span.tokens), stop)
            if low < high:
                inside, cells = slice(low - at, high - at), slice(column + low - start, column + high - start)
                b.tokens[row, cells] = span.tokens[inside]
                b.turn[row, cells] = turn
                b.role[row, cells] = roles[span.role]
                b.act[row, cells] = span.act
                for name in ("tags", "logp", "entropy", "certainty"):
                    values = getattr(span, name)
                    if values is not None:
                        getattr(b, name)[row, cells] = values[inside]
                if span.act == SAMPLED:
                    b.temperature[row, cells] = span.temperature if span.temperature > 0 else 1.0
                if span.kept is not None:
                    b.kept[row, cells, : span.kept.shape[1]] = span.kept[inside]
            turn += span.act != OBSERVED
            at += len(span.tokens)
        if item.bonus is not None:
            b.bonus[row, where] = item.bonus[start:stop]
        self.length[row] += stop - start
        return column


class RowsExhausted(ValueError):
    """The streams do not fit the batch's rows: pack again with a larger max_micro."""

    def __init__(self, shape: Shape):
        super().__init__(f"more than {shape.max_micro} micro-batches of {shape.rows} rows x {shape.tokens} tokens")


def pack(
    groups: Sequence[Group],
    paid: Sequence[Sequence[Paid]],
    roles: Mapping[str, int],
    rewards: Sequence[str],
    shape: Shape,
    adapters: Mapping[str, int] = MappingProxyType({}),
    first: tuple[int, int] = (0, 0),
) -> Packed:
    """Lay the trained streams of one model's roles into rows.

    paid[g][i] belongs to groups[g].trajectories[i]; roles gives the number of each of this model's roles; rewards the
    order of named rewards; adapters the number of the adapter of each role that has one; first the numbers in the batch
    of the first group and episode, where other processes pack those before. Raises ValueError for a stream that is
    longer than a row or begins with a token to learn, RowsExhausted when rows run out.
    """
    families, left_out = [], 0
    episode = first[1]
    for number, (group, payments) in enumerate(zip(groups, paid), first[0]):
        items = []
        for trajectory, payment in zip(group.trajectories, payments):
            if trajectory.status in LEFT_OUT:
                left_out += 1
            else:
                items += trained(
                    trajectory.streams, episode, number, trajectory.policy_version, payment, roles, rewards, adapters
                )
            episode += 1
        families += share(items)
    rows, pieces = _Rows(shape), arrange(families, shape)
    places: list[Place] = []
    for piece in pieces:
        write(piece, rows, roles, places)
    num_rows = 1 + max((piece.row for piece in pieces), default=-1)
    num_micro = max(1, -(-num_rows // shape.rows))
    used = int(rows.length.sum())
    batch = by_micro_batch(rows.batch, shape)
    fill = used / max(1, num_rows * shape.tokens)
    return Packed(batch, num_micro, places, fill, len(groups), episode - first[1], left_out)


def trained(
    streams: Sequence[Stream], episode: int, group: int, version: int, paid: Paid, roles: Mapping[str, int],
    rewards: Sequence[str], adapters: Mapping[str, int],
) -> list[Item]:  # fmt: skip
    """The streams of one trajectory that belong to this model and hold something to learn."""
    items = []
    for call, stream in enumerate(streams):
        if stream.role in roles and any(span.act != OBSERVED for span in stream.spans):
            if stream.spans[0].act != OBSERVED:
                raise ValueError(
                    f"stream {stream.name!r} begins with a token to learn, which nothing predicts: append at least one "
                    "observed token to it first"
                )
            amounts = [paid.per_call[name][call] if name in paid.per_call else np.nan for name in rewards]
            bonus = paid.per_token.get(stream.name)
            paid_here = np.array(amounts, np.float32)
            items.append(Item(stream, episode, call, group, version, paid_here, adapters.get(stream.role), bonus))
    return items


def share(items: Sequence[Item]) -> list[Family]:
    """Streams of one group by equal leading observations, which one adapter has read."""
    families: list[Family] = []
    by_prefix: dict[tuple[bytes, int | None], Family] = {}
    for item in items:
        prefix = item.stream.spans[0].tokens
        if len(prefix) - 1 < NEGLIGIBLE:
            families.append(Family([item]))
            continue
        key = prefix.tobytes(), item.adapter
        family = by_prefix.get(key)
        if family is None:
            family = by_prefix[key] = Family([], len(prefix) - 1)
            families.append(family)
        family.items.append(item)
    return families


class Piece(NamedTuple):
    """Streams of one family that lie in one row; shared: tokens of the prefix before them, once (0: none)."""

    row: int
    items: list[Item]
    shared: int

    @property
    def size(self) -> tuple[int, int]:
        """Columns and segments."""
        columns = sum(item.stream.num_tokens - self.shared for item in self.items) + self.shared
        return columns, len(self.items) + (self.shared > 0)


def arrange(families: Sequence[Family], shape: Shape) -> list[Piece]:
    """Which row each stream goes into: of a few ways to cut families the one with the fewest rows, then the fewest
    columns. Cutting a family into a gap fills rows and repeats its prefix: what pays depends on the lengths."""
    longest = max((item.stream.num_tokens for family in families for item in family.items), default=0)
    if longest > shape.tokens:
        raise ValueError(f"a stream has {longest} tokens, a training row {shape.tokens}: raise update.row_tokens")
    whole = sorted(
        (replace(f, items=sorted(f.items, key=lambda item: -item.stream.num_tokens)) for f in families),
        key=lambda f: -sum(item.stream.num_tokens - f.shared for item in f.items) - f.shared,
    )
    ways = [arranged(whole, shape, least) for least in (shape.max_segments, 4, 2, 1)]

    def cost(pieces: list[Piece]) -> tuple[int, int]:
        return 1 + max((piece.row for piece in pieces), default=-1), sum(piece.size[0] for piece in pieces)

    best = min(ways, key=cost)
    if cost(best)[0] > shape.rows * shape.max_micro:
        raise RowsExhausted(shape)
    return best


def arranged(families: Sequence[Family], shape: Shape, least: int) -> list[Piece]:
    """Best fit decreasing: a family goes where the least room stays. Where it fits nowhere as a whole, `least` of its
    streams or more go where most of them fit, and else as many as fit into a new row."""
    smallest = min((item.stream.num_tokens for family in families for item in family.items), default=0)
    room: dict[int, tuple[int, int]] = {}  # of each row that holds something more: columns, segments
    pieces: list[Piece] = []
    num_rows = 0
    for family in families:
        remaining = family.items
        while remaining:
            shortest = remaining[-1].stream.num_tokens
            able = [chosen(remaining, family.shared, row, *each) for row, each in room.items() if each[0] >= shortest]
            most = max((len(piece.items) for piece in able), default=0)
            if most < min(least, len(remaining)):
                room[num_rows] = shape.tokens, shape.max_segments - 1
                able = [chosen(remaining, family.shared, num_rows, *room[num_rows])]
                num_rows, most = num_rows + 1, len(able[0].items)
            able = [piece for piece in able if len(piece.items) == most]
            piece = min(able, key=lambda piece: (room[piece.row][0] - piece.size[0], piece.row))
            columns, segments = (had - took for had, took in zip(room.pop(piece.row), piece.size))
            if columns >= smallest and segments:
                room[piece.row] = columns, segments
            pieces.append(piece)
            taken = {id(item) for item in piece.items}
            remaining = [item for item in remaining if id(item) not in taken]
    return pieces


def chosen(items: list[Item], shared: int, row: int, columns: int, segments: int) -> Piece:
    """As many streams, the longest first, as that much room holds: behind their prefix if there are two, else one."""
    alone = next((item for item in items if item.stream.num_tokens <= columns), None)
    if alone is None:
        return Piece(row, [], 0)
    found, left = [], columns - shared
    for item in items if shared else ():
        if item.stream.num_tokens - shared <= left and len(found) < segments - 1:
            found.append(item)
            left -= item.stream.num_tokens - shared
    return Piece(row, found, shared) if len(found) > 1 else Piece(row, [alone], 0)


def write(piece: Piece, rows: _Rows, roles: Mapping[str, int], places: list[Place]) -> None:
    """The tokens of a piece into its row."""
    row, items, shared = piece
    parent = 0
    if shared:
        parent = rows.segment(row)
        rows.write(row, parent, items[0], 0, shared, roles)
        fill_segment(rows.batch.segments, row, parent, items[0], paid=False)
    for item in items:
        segment = rows.segment(row, parent)
        column = rows.write(row, segment, item, shared, item.stream.num_tokens, roles)
        fill_segment(rows.batch.segments, row, segment, item, paid=True)
        places.append(Place(item.episode, item.call, row, column, shared, item.stream.num_tokens - shared))


def fill_segment(s: Segments, row: int, segment: int, item: Item, paid: bool) -> None:
    s.group[row, segment] = item.group
    s.version[row, segment] = item.version
    if s.adapters is not None and item.adapter is not None:
        s.adapters[row, segment, item.adapter] = 1
    if paid:  # a shared prefix belongs to no single episode
        s.episode[row, segment] = item.episode
        s.call[row, segment] = item.call
        s.valid[row, segment] = ~np.isnan(item.rewards)
        s.rewards[row, segment] = np.nan_to_num(item.rewards)


def unpack(values: np.ndarray, places: Sequence[Place]) -> dict[tuple[int, int], np.ndarray]:
    """Per-token values [M, R, T] back to streams: (episode, call) -> [num_tokens - shared prefix]."""
    flat = values.reshape(-1, values.shape[-1])
    return {(p.episode, p.call): flat[p.row, p.column : p.column + p.count] for p in places}
