"""The automata stop exactly where a search in the decoded text would."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlrag.rollout.stops import StopTable, automaton, over_vocabulary

# Tokens that hold parts of stop strings, several of them, and parts of a character.
PIECES = [*"<>/ab", "</", "a>", "</a", "</a>", "x</a>b<", "ab", "aba", "ba", "é", "→", "→é"]
VOCABULARY = [piece.encode() for piece in PIECES] + ["é".encode()[:1], "é".encode()[1:], "→".encode()[:2], b"\x92", b""]
SETS = [
    ("</a>",),
    ("a", "ab"),
    ("ab", "b"),
    ("aba", "bab"),
    ("→", "é→"),
    ("é",),
    ("</a>", "<a>", "a>b"),
    ("abab", "ba", "a/"),
]


def play(table: StopTable, stops: tuple[str, ...], tokens: list[int]) -> tuple[int | None, str | None]:
    """How many tokens were read when the automaton stopped, and the stop string it names."""
    state = table.start(stops)
    for count, token in enumerate(tokens, start=1):
        state = int(table.table[state, token])
        if table.accepting[state]:
            return count, table.found(state)
    return None, table.found(state)


def search(stops: tuple[str, ...], tokens: list[int]) -> tuple[int | None, set[str]]:
    """The first count of tokens whose bytes hold a stop string, and the stop strings that end first of all."""
    encoded = {stop: stop.encode() for stop in stops}
    whole = b"".join(VOCABULARY[token] for token in tokens)
    ends = {stop: whole.find(text) + len(text) for stop, text in encoded.items() if text in whole}
    if not ends:
        return None, set()
    first = min(ends.values())
    lengths = np.cumsum([len(VOCABULARY[token]) for token in tokens])
    return int(np.searchsorted(lengths, first)) + 1, {stop for stop, end in ends.items() if end == first}


@pytest.fixture(scope="module")
def table() -> StopTable:
    return StopTable(VOCABULARY, 256)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(SETS), st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=14))
@example(("</a>",), [PIECES.index("</"), PIECES.index("a>")])
@example(("</a>",), [PIECES.index("x</a>b<")])
@example(("é",), [len(PIECES), len(PIECES) + 1])
def test_stops_where_a_text_search_does(table, stops, tokens):
    count, found = play(table, stops, tokens)
    wanted, names = search(stops, tokens)
    assert count == wanted
    assert (found in names) if names else found is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(st.binary(max_size=4), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=12),
)
def test_any_stops_over_any_vocabulary(stops, vocabulary, tokens):
    """Composed with tokens, the automaton goes where it goes byte by byte."""
    transitions, found = automaton([stop.encode() for stop in stops])
    composed = over_vocabulary(transitions, vocabulary)
    state = by_byte = 0
    text = b""
    for token in tokens:
        token %= len(vocabulary)
        text += vocabulary[token]
        state = int(composed[state, token])
        for byte in vocabulary[token]:
            by_byte = int(transitions[by_byte, byte])
        assert state == by_byte
        assert (found[state] >= 0) == any(stop.encode() in text for stop in stops)


def test_the_longer_of_two_stops_that_end_together_is_named():
    table = StopTable([b"a", b"b"], 16)
    assert play(table, ("b", "ab"), [0, 1]) == (2, "ab")
    assert play(table, ("ab", "b"), [1]) == (1, "b")


def test_sets_do_not_disturb_each_other():
    table = StopTable(VOCABULARY, 256)
    starts = [table.start(stops) for stops in SETS]
    assert len(set(starts)) == len(SETS)
    assert [table.start(stops) for stops in SETS] == starts
    assert table.version == len(SETS), "known sets change nothing"
    tokens = [PIECES.index(piece) for piece in ("a", "b", "a", "→")]
    fresh = [play(StopTable(VOCABULARY, 64), stops, tokens) for stops in SETS]
    assert [play(table, stops, tokens) for stops in SETS] == fresh


def test_without_stops_nothing_stops():
    table = StopTable(VOCABULARY, 256)
    table.start(("a",))
    assert table.start(()) == 0
    assert play(table, (), list(range(len(VOCABULARY)))) == (None, None)


def test_the_table_keeps_its_shape_and_says_when_it_is_full():
    table = StopTable([b"a", b"b"], 6)
    table.start(("aab",))
    assert (table.table.shape, table.table.dtype) == ((6, 2), np.int16)
    before = table.table.copy()
    with pytest.raises(ValueError, match=r"'ba'.* need 3 more states, 1 of 6 are left: raise rollout\.max_stop_states"):
        table.start(("ba",))
    np.testing.assert_array_equal(table.table, before)


@pytest.mark.parametrize("max_states", [0, 2**15])
def test_impossible_sizes_are_named(max_states):
    with pytest.raises(ValueError, match=f"max_stop_states is {max_states}: give 1 ... 32767"):
        StopTable([b"a"], max_states)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty one would stop before the first token"):
        StopTable([b"a"], 8).start(("a", ""))
