"""The tags of a search agent: what a turn asks for, and which region every token belongs to.

Everything is found in the bytes of the sampled tokens, never by encoding text again: a byte-pair vocabulary may split
a tag over several tokens or merge it with its neighbours. What the model writes is only ever its own text: an
`<information>` it writes itself is labelled FORGED and is no observation, whatever it says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Labels of `Span.tags`. FORGED: an information block the model wrote itself.
NONE, THINK, SEARCH, INFORMATION, ANSWER, FORGED = 0, 1, 2, 3, 4, 5

MODEL, ENVIRONMENT = "model", "environment"
Block = tuple[str, str]  # (name, who wrote it): name is a tag's, or "text", "broken", "correction", "force"


class Tag(NamedTuple):
    """The opening and the closing string of one tag."""

    open: str
    close: str


class Action(NamedTuple):
    """What a turn asks for: `name` is "search", "answer" or None (invalid); `content` is stripped."""

    name: str | None
    content: str


class Reading(NamedTuple):
    """A reply, read once: its action, its blocks in order, and the region of each of its bytes."""

    action: Action
    blocks: list[Block]
    regions: list[tuple[int, int]]  # (label, first byte after it), in order, covering the whole reply


@dataclass(frozen=True)
class Tags:
    """A tag set; the default is Search-R1's. Names and both strings can be changed, the four meanings cannot."""

    think: Tag = field(default=Tag("<think>", "</think>"))
    search: Tag = field(default=Tag("<search>", "</search>"))
    information: Tag = field(default=Tag("<information>", "</information>"))
    answer: Tag = field(default=Tag("<answer>", "</answer>"))
    _marks: dict[bytes, tuple[str, bool]] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        strings = self.strings
        if len(set(strings)) < len(strings) or not all(strings):
            raise ValueError(f"tag strings must be different and not empty, these are not: {strings}")
        marks = {}
        for name in _LABELS:
            tag = getattr(self, name)
            marks[tag[0].encode()], marks[tag[1].encode()] = (name, True), (name, False)
        longest_first = sorted(marks, key=len, reverse=True)
        object.__setattr__(self, "_marks", marks)
        object.__setattr__(self, "_pattern", re.compile(b"|".join(map(re.escape, longest_first))))

    @property
    def strings(self) -> tuple[str, ...]:
        """All eight strings, for vocabularies that give each one token."""
        return (*self.think, *self.search, *self.information, *self.answer)

    @property
    def stop(self) -> tuple[str, str]:
        """What ends a turn: the closing of a search or of an answer."""
        return self.search.close, self.answer.close

    def parse(self, text: str) -> Action:
        """The action of a turn: the first search or answer that is closed wins, from its nearest opening."""
        return self.read(text.encode()).action

    def read(self, data: bytes, *, inside: str | None = None) -> Reading:
        """Read the bytes of one reply. inside: the tag that is open already (an observed `<answer>`).

        An opening starts its region wherever it stands, a closing ends the region it stands in; a region that is
        not closed by its own closing is a "broken" block, and text outside all regions a "text" block.
        """
        action = None
        blocks: list[Block] = []
        regions: list[tuple[int, int]] = []
        name, start, position = inside, 0, 0  # the open region, where its content starts, end of the last mark
        for mark in self._pattern.finditer(data):
            other, opens = self._marks[mark[0]]
            first = mark.start()
            if name is None:
                if data[position:first].strip():
                    blocks.append(("text", MODEL))
                if first > position:
                    regions.append((NONE, first))
                if not opens:
                    blocks.append(("broken", MODEL))
                    regions.append((NONE, mark.end()))
            elif opens:
                blocks.append(("broken", MODEL))
                regions.append((_LABELS[name], first))
            else:
                blocks.append((name, MODEL) if name == other else ("broken", MODEL))
                regions.append((_LABELS[name], mark.end()))
                if name == other and action is None and name in ("search", "answer"):
                    action = Action(name, data[start:first].decode("utf-8", errors="replace").strip())
            position = mark.end()
            name, start = (other, position) if opens else (None, 0)
        if name is not None:
            blocks.append(("broken", MODEL))
            regions.append((_LABELS[name], len(data)))
        elif position < len(data):
            if data[position:].strip():
                blocks.append(("text", MODEL))
            regions.append((NONE, len(data)))
        return Reading(action or Action(None, ""), blocks, regions)


# What a reply's regions are labelled; an information block in a reply was written by the model.
_LABELS = {"think": THINK, "search": SEARCH, "information": FORGED, "answer": ANSWER}


def label_tokens(lengths: Sequence[int], regions: Sequence[tuple[int, int]]) -> np.ndarray:
    """The region of every token, int32 [n], from the tokens' lengths in bytes.

    A token that reaches over several regions takes the first one that is not NONE: `" <"` belongs to the tag it
    opens, `">\\n"` to the tag it closes.
    """
    labels = []
    position, at = 0, 0
    for length in lengths:
        end = position + length
        while at < len(regions) and regions[at][1] <= position:
            at += 1
        found, reach = NONE, at
        while found == NONE and reach < len(regions) and (reach == at or regions[reach - 1][1] < end):
            found = regions[reach][0]
            reach += 1
        labels.append(found)
        position = end
    return np.asarray(labels, np.int32)
