"""Stop strings as byte automata run over a vocabulary table.

A stop string may begin or end in the middle of a token, and span any number of tokens. For every set of stop strings
the Aho-Corasick automaton over bytes is composed with each token's bytes once, on the host; the device then needs one
table lookup a token: state' = table[state, token].
"""

from collections import deque
from collections.abc import Sequence

import numpy as np


def automaton(stops: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Byte transitions [states, 256] and, per state, the index of the stop string found there (-1: none).

    Accepting states are absorbing: what follows a stop within its token changes nothing.
    """
    children: list[dict[int, int]] = [{}]
    found = [-1]
    for index, stop in enumerate(stops):
        state = 0
        for byte in stop:
            if byte not in children[state]:
                children.append({})
                found.append(-1)
                children[state][byte] = len(children) - 1
            state = children[state][byte]
        if found[state] < 0:
            found[state] = index
    table = np.zeros((len(children), 256), np.int32)
    fail = [0] * len(children)
    queue: deque[int] = deque()
    for byte, child in children[0].items():
        table[0, byte] = child
        queue.append(child)
    while queue:
        state = queue.popleft()
        table[state] = table[fail[state]]
        if found[state] < 0:
            found[state] = found[fail[state]]
        for byte, child in children[state].items():
            fail[child] = int(table[fail[state], byte])
            table[state, byte] = child
            queue.append(child)
    accepting = np.array(found) >= 0
    table[accepting] = np.arange(len(children))[accepting, None]
    return table, np.array(found, np.int32)


def over_vocabulary(table: np.ndarray, vocabulary: Sequence[bytes]) -> np.ndarray:
    """Compose byte transitions [states, 256] with tokens: [states, V]. Byte k of all tokens is stepped at once."""
    lengths = np.array([len(token) for token in vocabulary])
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    padded = np.zeros((len(vocabulary), longest), np.uint8)
    for row, token in enumerate(vocabulary):
        padded[row, : len(token)] = np.frombuffer(token, np.uint8)
    padded, remaining = padded[order], lengths[order]
    states = np.broadcast_to(np.arange(len(table), dtype=np.int32)[:, None], (len(table), len(vocabulary))).copy()
    for k in range(longest):
        longer = int(np.searchsorted(-remaining, -k, side="left"))  # tokens with more than k bytes come first
        states[:, :longer] = table[states[:, :longer], padded[:longer, k]]
    result = np.empty_like(states)
    result[:, order] = states
    return result


class StopTable:
    """All stop sets of a run in one table of fixed shape [max_states, V], so that new sets never recompile.

    State 0 never stops. `start(stops)` is the state a call begins in; `found(state)` the stop string it ended on.
    """

    def __init__(self, vocabulary: Sequence[bytes], max_states: int):
        if not 1 <= max_states <= np.iinfo(np.int16).max:
            raise ValueError(f"rollout.max_stop_states is {max_states}: give 1 ... {np.iinfo(np.int16).max}")
        self._vocabulary = vocabulary
        self.table = np.zeros((max_states, len(vocabulary)), np.int16)
        self.accepting = np.zeros(max_states, bool)
        self.version = 0  # grows when the table changes: the device copy is stale then
        self._found: list[str | None] = [None]
        self._starts: dict[tuple[str, ...], int] = {(): 0}

    def start(self, stops: tuple[str, ...]) -> int:
        if stops in self._starts:
            return self._starts[stops]
        if any(not stop for stop in stops):
            raise ValueError(f"stop strings are {stops!r}: an empty one would stop before the first token")
        transitions, found = automaton([stop.encode() for stop in stops])
        first, last = len(self._found), len(self._found) + len(transitions)
        if last > len(self.table):
            raise ValueError(
                f"stop strings {stops!r} need {len(transitions)} more states, {len(self.table) - first} of "
                f"{len(self.table)} are left: raise rollout.max_stop_states"
            )
        self.table[first:last] = over_vocabulary(transitions, self._vocabulary) + first
        self.accepting[first:last] = found >= 0
        self._found += [stops[index] if index >= 0 else None for index in found]
        self._starts[stops] = first
        self.version += 1
        return first

    def found(self, state: int) -> str | None:
        return self._found[state]
