"""Packing keeps every number of every token, once, and unpacking finds it again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.packing import NEGLIGIBLE, Place, RowsExhausted, Shape, unpack
from rlrag.rewards.paid import Paid
from rlrag.trajectory import (
    COMPLETED,
    FAILED,
    OBSERVED,
    SAMPLED,
    SEARCH_FAILED,
    TRUNCATED,
    Example,
    Group,
    Stream,
    Trajectory,
)
from tests.episodes import (
    NUM_KEPT,
    REWARDS,
    ROLES,
    VOCAB_SIZE,
    forced,
    make_groups,
    observed,
    pack_groups,
    pay,
    sampled,
)

STATUSES = (COMPLETED, TRUNCATED, SEARCH_FAILED, FAILED)
PER_TOKEN = ("tags", "logp", "entropy", "certainty")


def flat(leaf: np.ndarray) -> np.ndarray:
    """[M, R, ...] -> [M * R, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])


def expected(stream: Stream) -> dict[str, np.ndarray]:
    """Every per-token field of a stream, token by token."""
    rows, turn = [], 0
    for span in stream.spans:
        for i, token in enumerate(span.tokens):
            row = {name: 0 if getattr(span, name) is None else getattr(span, name)[i] for name in PER_TOKEN}
            hot = span.act == SAMPLED and span.temperature > 0
            row |= {"tokens": token, "act": span.act, "turn": turn, "role": ROLES[span.role]}
            row |= {"temperature": np.float32(span.temperature if hot else 1.0)}
            row |= {"kept": span.kept[i] if span.kept is not None else np.full(NUM_KEPT, -1)}
            rows.append(row)
        turn += span.act != OBSERVED
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return table | {"positions": np.arange(len(rows))}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.sampled_from([70, 96, 200]), st.integers(2, 12),
    st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_every_token_is_packed_once_with_its_numbers(seed, num_questions, group_size, tokens, max_segments, rows):
    groups = make_groups(seed, num_questions, group_size, statuses=STATUSES)
    paid = pay(groups, seed)
    packed = pack_groups(groups, paid, tokens=tokens, max_segments=max_segments, rows=rows, max_micro=64)
    batch, s = packed.batch, packed.batch.segments
    episodes = [(g, t) for g, group in enumerate(groups) for t in group.trajectories]
    kept = [(e, g, t) for e, (g, t) in enumerate(episodes) if t.status in (COMPLETED, TRUNCATED)]
    assert (packed.num_groups, packed.num_episodes) == (num_questions, num_questions * group_size)
    assert packed.left_out == len(episodes) - len(kept)
    wanted = {(e, call): (g, t, stream) for e, g, t in kept for call, stream in enumerate(t.streams)}
    assert sorted((p.episode, p.call) for p in packed.places) == sorted(wanted)

    covered = np.zeros(flat(batch.segment).shape, bool)
    for place in packed.places:
        g, trajectory, stream = wanted[place.episode, place.call]
        fields, cells = expected(stream), slice(place.column, place.column + place.count)
        assert place.start + place.count == stream.num_tokens
        for name, values in fields.items():
            np.testing.assert_array_equal(flat(getattr(batch, name))[place.row, cells], values[place.start :], name)
        assert not covered[place.row, cells].any()
        covered[place.row, cells] = True

        segments = flat(batch.segment)[place.row]
        segment = segments[place.column]
        assert (segments[cells] == segment).all()
        assert (segments == segment).sum() == place.count, "a segment holds one stream's tokens and no others"
        assert flat(batch.act)[place.row, place.column] == OBSERVED, "the first token of a segment cannot be predicted"
        payment = paid[g][place.episode - sum(len(group.trajectories) for group in groups[:g])]
        amounts = np.array([payment.per_call[name][place.call] for name in REWARDS], np.float32)
        at = (place.row, segment)
        assert (flat(s.episode)[at], flat(s.call)[at], flat(s.group)[at]) == (place.episode, place.call, g)
        assert flat(s.version)[at] == trajectory.policy_version
        np.testing.assert_array_equal(flat(s.valid)[at], ~np.isnan(amounts))
        np.testing.assert_array_equal(flat(s.rewards)[at], np.nan_to_num(amounts))

        # The prefix lies in the parent segment of the same row, and only there.
        parent = flat(s.parent)[at]
        assert (parent > 0) == (place.start > 0)
        if parent:
            prefix = np.flatnonzero(segments == parent)
            np.testing.assert_array_equal(prefix, prefix[0] + np.arange(place.start))
            assert prefix[-1] < place.column
            assert place.start >= NEGLIGIBLE
            for name in ("tokens", "positions", "act"):
                np.testing.assert_array_equal(
                    flat(getattr(batch, name))[place.row, prefix], fields[name][: place.start]
                )
            assert flat(s.episode)[place.row, parent] == -1
            assert not flat(s.valid)[place.row, parent].any()
            assert (flat(s.parent)[place.row] == parent).sum() >= 2, "a prefix that nobody shares"
            covered[place.row, prefix] = True

    assert (covered == (flat(batch.segment) > 0)).all(), "tokens of nobody"
    trained = sum(int((stream.act != OBSERVED).sum()) for _, _, stream in wanted.values())
    assert (batch.act > 0).sum() == trained
    assert flat(batch.segment).max() < max_segments
    used = np.flatnonzero((flat(batch.segment) > 0).any(-1))
    assert len(used) == 0 or used[-1] == len(used) - 1, "rows are used in order"
    assert packed.num_micro == max(1, -(-len(used) // rows))
    assert packed.fill == pytest.approx(covered.sum() / max(1, len(used) * tokens))

    found = unpack(batch.logp, packed.places)
    assert found.keys() == wanted.keys()
    for place in packed.places:
        logp = expected(wanted[place.episode, place.call][2])["logp"]
        np.testing.assert_array_equal(found[place.episode, place.call], logp[place.start :])


def one_stream(*spans) -> Group:
    stream = Stream("main", "talker")
    for span in spans:
        stream.add(span)
    example = Example("q", "", ("",))
    return Group(example, [Trajectory(example, streams=[stream])])


def alone(length: int, prompt: int) -> Group:
    """A group of one: nothing to share."""
    dice = np.random.default_rng(length)
    return one_stream(observed("talker", [prompt]), sampled(dice, "talker", length - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=40))
def test_at_most_one_row_is_left_half_empty(lengths):
    packed = pack_groups(
        [alone(length, i % VOCAB_SIZE) for i, length in enumerate(lengths)], tokens=50, max_segments=99
    )
    used = (flat(packed.batch.segment) > 0).sum(-1)
    used = used[used > 0]
    assert (used <= 25).sum() <= 1
    assert used.sum() == sum(lengths)


@pytest.mark.parametrize("max_segments", [2, 3, 4, 9])
def test_the_prompt_of_a_group_is_stored_once_a_row(max_segments):
    dice = np.random.default_rng(0)
    prompt, example = dice.integers(VOCAB_SIZE, size=40), Example("q", "", ("",))

    def stream() -> Stream:
        stream = Stream("main", "talker")
        stream.add(observed("talker", prompt))
        stream.add(sampled(dice, "talker", 4))
        return stream

    group = Group(example, [Trajectory(example, i, [stream()]) for i in range(6)])
    packed = pack_groups([group], tokens=64, max_segments=max_segments)
    # 39 shared, 5 each: five children fill a row; a prefix takes a segment's place.
    children = min(5, max_segments - 2)
    sizes = {0: [44] * 6, 1: [44] * 6, 2: [49] * 3, 5: [64, 44]}[children]
    used = (flat(packed.batch.segment) > 0).sum(-1)
    assert sorted(used[used > 0].tolist()) == sorted(sizes)


def searched(seed: int, questions: int, group_size: int, prompt, turns, answer, document) -> list[Group]:
    """Groups with lengths between bounds: a prompt, answers in turns, documents between them."""
    dice = np.random.default_rng(seed)

    def between(bounds) -> int:
        return int(dice.integers(bounds[0], bounds[1] + 1))

    groups = []
    for question in range(questions):
        example, tokens = Example(f"q{question}", "", ("",)), dice.integers(VOCAB_SIZE, size=between(prompt))
        trajectories = []
        for sample in range(group_size):
            stream = Stream("main", "talker")
            stream.add(observed("talker", tokens))
            for turn in range(between(turns)):
                if turn:
                    stream.add(observed("talker", [0] * between(document)))
                stream.add(forced(dice, "talker", between(answer)))
            trajectories.append(Trajectory(example, sample, [stream]))
        groups.append(Group(example, trajectories))
    return groups


@pytest.mark.parametrize(
    ("lengths", "tokens", "most_rows"),
    [
        # Search-R1: prompt 512, eight answers of 128 in two turns, a document of 128 between them. Two groups' halves
        # share a row of 4,096 (first fit left every group a row of its own: 32 rows, 63 % full).
        ((32, 8, (512, 512), (2, 2), (64, 64), (128, 128)), 4096, 24),
        ((8, 8, (512, 512), (2, 2), (64, 64), (128, 128)), 2568, 8),
        ((32, 8, (300, 700), (1, 4), (20, 120), (100, 200)), 2048, 77),  # 88 by first fit
        ((16, 8, (12, 20), (1, 3), (3, 9), (8, 14)), 96, 46),  # as the demo
        ((8, 8, (64, 64), (1, 1), (128, 128), (0, 0)), 1096, 8),
    ],
)
def test_rows_are_filled(lengths, tokens, most_rows):
    packed = pack_groups(searched(0 if tokens > 96 else 2, *lengths), tokens=tokens, max_segments=16, max_micro=64)
    assert packed.fill >= 0.9
    assert (flat(packed.batch.segment) > 0).any(-1).sum() <= most_rows


def test_packing_is_the_same_every_time():
    first, second = (pack_groups(make_groups(5, 6, 5)) for _ in range(2))
    assert first.places == second.places


def test_rows_run_out_and_a_larger_batch_takes_them():
    groups = make_groups(3, 4, 4)
    with pytest.raises(RowsExhausted, match="more than 1 micro-batches of 1 rows x 96 tokens"):
        pack_groups(groups, rows=1, max_micro=1)
    assert pack_groups(groups, rows=1, max_micro=64).num_micro > 1


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match=r"a stream has 50 tokens, a training row 49: raise update\.row_tokens"):
        pack_groups([alone(50, 0)], tokens=49)
    dice = np.random.default_rng(0)
    with pytest.raises(ValueError, match="stream 'main' begins with a token to learn"):
        pack_groups([one_stream(forced(dice, "talker", 3))])
    with pytest.raises(ValueError, match=r"max_segments is 1: give 2 or more"):
        Shape(1, 8, 1, 1, 0, 0)
    with pytest.raises(ValueError, match=r"rows 0: give a positive number"):
        Shape(0, 8, 2, 1, 0, 0)


def test_streams_of_other_models_and_without_actions_are_not_packed():
    dice = np.random.default_rng(0)
    group = one_stream(observed("talker", range(9)), sampled(dice, "talker", 2))
    other, silent = Stream("other", "critic"), Stream("silent", "talker")
    other.add(observed("critic", [1]))
    other.add(sampled(dice, "critic", 2))
    silent.add(observed("talker", [1, 2]))
    group.trajectories[0].streams += [other, silent]
    packed = pack_groups([group], [[Paid({"answer": [1.0, 1.0, 1.0]})]])
    assert packed.places == [Place(0, 0, 0, 0, 0, 11)]
    # A reward that the payment does not mention is not valid.
    assert packed.batch.segments.valid[0, 0, 1].tolist() == [True, False]


def test_nothing_to_learn_is_an_empty_batch():
    packed = pack_groups([])
    assert (packed.num_micro, packed.fill, packed.places) == (1, 0.0, [])
    assert not (packed.batch.act > 0).any()


def test_token_bonuses_lie_at_their_tokens():
    dice = np.random.default_rng(1)
    group = one_stream(observed("talker", [1, 2]), sampled(dice, "talker", 3))
    bonus = np.arange(5, dtype=np.float32)
    packed = pack_groups([group], [[Paid({"answer": [1.0]}, per_token={"main": bonus})]])
    np.testing.assert_array_equal(packed.batch.bonus[0, 0, :6], [*bonus, 0])
