import json

import numpy as np
import pytest

from rlrag.episodes import EpisodeLog, shorten, token_texts
from rlrag.metrics import num_rows, rewind
from rlrag.packing import unpack
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Passage, SearchRecord
from tests.episodes import VOCAB_SIZE, make_groups, pack_groups, pay

VOCABULARY = [bytes([97 + number % 26]) for number in range(VOCAB_SIZE)]


def rows_of(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_row_holds_every_token_with_its_numbers(tmp_path):
    groups = make_groups(3)
    paid = pay(groups)
    packed = pack_groups(groups, paid)
    weight = np.random.default_rng(0).normal(size=packed.batch.act.shape).astype(np.float32) * (packed.batch.act > 0)
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 7, groups, paid, 1000, unpack(weight, packed.places))
    rows, episode = rows_of(log), 0
    flat = weight.reshape(-1, weight.shape[-1])
    for group, payments in zip(groups, paid):
        for trajectory, payment in zip(group.trajectories, payments):
            row = rows[episode]
            assert (row["stage"], row["step"], row["id"], row["sample"]) == (
                "main",
                7,
                group.example.id,
                trajectory.sample,
            )
            assert row["rewards"].keys() == payment.per_call.keys()
            for call, (stream, shown) in enumerate(zip(trajectory.streams, row["streams"], strict=True)):
                ids = [id for span in shown["spans"] for id in span["tokens"]]
                assert ids == stream.tokens.tolist()
                assert [t for span in shown["spans"] for t in span["texts"]] == [VOCABULARY[id].decode() for id in ids]
                place = next(p for p in packed.places if (p.episode, p.call) == (episode, call))
                wanted = np.zeros(stream.num_tokens)
                wanted[place.start :] = flat[place.row, place.column : place.column + place.count]
                at = 0
                for span, record in zip(shown["spans"], stream.spans, strict=True):
                    n = len(span["tokens"])
                    assert ("advantage" in span) == (record.act > 0)
                    if record.act:
                        np.testing.assert_allclose(span["advantage"], wanted[at : at + n], rtol=1e-3, atol=1e-6)
                    assert span.get("tags") == (None if record.tags is None else record.tags.tolist())
                    if record.logp is not None:
                        np.testing.assert_allclose(span["logp"], record.logp, rtol=1e-3)
                    at += n
            episode += 1
    assert len(rows) == episode


def test_whole_groups_first_up_to_the_limit(tmp_path):
    groups = make_groups(3)  # 3 groups of 4
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 1, groups, pay(groups), 6)
    assert [row["id"] for row in rows_of(log)] == [groups[0].example.id] * 4 + [groups[1].example.id] * 2
    log.write("main", 2, groups, pay(groups), 0)
    assert len(rows_of(log)) == 6


def test_searches_with_gold_marked(tmp_path):
    groups = make_groups(3)
    trajectory = groups[0].trajectories[0]
    object.__setattr__(trajectory.example, "gold", ("p",))
    trajectory.searches = [
        SearchRecord(("who?",), [[Passage("p", "t", "x", 1.23456), Passage("q", "", "y")]], 0.5, None),
        SearchRecord(("and?",), [[]], 0.1, "TimeoutError: late"),
    ]
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 1, groups, pay(groups), 1)
    first, second = rows_of(log)[0]["searches"]
    assert [(p["id"], p["gold"], p["score"]) for p in first["results"][0]] == [("p", True, 1.235), ("q", False, None)]
    assert (second["error"], second["results"]) == ("TimeoutError: late", [[]])


def test_rows_of_steps_that_are_played_again_are_dropped(tmp_path):
    groups = make_groups(3)
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 1, groups, pay(groups), 2)
    saved = num_rows(log.path)
    log.write("main", 2, groups, pay(groups), 3)
    rewind(log.path, saved)
    log.write("main", 2, groups, pay(groups), 1)
    assert [row["step"] for row in rows_of(log)] == [1, 1, 2]


def test_bytes_that_are_no_text_are_shown():
    assert token_texts([b"a", "é".encode(), b"\xc3", b"\x00", b""]) == ["a", "é", "\\xc3", "\x00", "<4>"]


@pytest.mark.parametrize(("value", "short"), [(1.23456, 1.235), (np.float32(0), 0.0), (np.nan, None), (None, None)])
def test_numbers_are_short(value, short):
    assert shorten(value) == short


def test_an_episode_that_nobody_paid(tmp_path):
    groups = make_groups(3)
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 1, groups, [[Paid({}) for _ in group.trajectories] for group in groups], 2)
    assert [row["reward"] for row in rows_of(log)] == [0.0, 0.0]


def test_half_of_a_surrogate_pair_in_a_dataset_ends_no_run(tmp_path):
    """JSON may hold it, UTF-8 may not."""
    groups = make_groups(3)
    object.__setattr__(groups[0].example, "question", "who? \ud800")
    log = EpisodeLog(tmp_path, VOCABULARY)
    log.write("main", 1, groups, pay(groups), 1)
    assert rows_of(log)[0]["question"] == "who? \ud800"
