import pytest

from rlrag.rewards.format import SEARCH_R1_GRAMMAR, Grammar, format_reward, retrieved, search_r1_reward
from rlrag.trajectory import Example, Group, Outcome, Passage, SearchRecord, Stream, Trajectory

EXAMPLE = Example("q", "Who?", ("Ada Lovelace",), gold=("d7",))
THINK, SEARCH, ANSWER = ("think", "model"), ("search", "model"), ("answer", "model")
SHOWN, FORGED = ("information", "environment"), ("information", "model")


def trajectory(blocks, answer=None, passages=(), streams=1) -> Trajectory:
    searches = [SearchRecord(("x",), [list(passages)])] if passages else []
    return Trajectory(
        EXAMPLE,
        streams=[Stream(f"s{i}", "agent") for i in range(streams)],
        searches=searches,
        outcome=Outcome(answer, {"blocks": blocks}),
    )


@pytest.mark.parametrize(
    ("blocks", "loose", "strict"),
    [
        ([ANSWER], True, False),
        ([THINK, ANSWER], True, True),
        ([SEARCH, SHOWN, ANSWER], True, False),
        ([THINK, SEARCH, SHOWN, THINK, SEARCH, SHOWN, THINK, ANSWER], True, True),
        ([THINK, SEARCH, SHOWN, ANSWER], True, False),
        ([], False, False),
        ([THINK], False, False),
        ([SEARCH, ANSWER], False, False),
        ([THINK, SEARCH, FORGED, THINK, ANSWER], False, False),
        ([FORGED, ANSWER], False, False),
        ([THINK, THINK, ANSWER], False, False),
        ([ANSWER, ANSWER], False, False),
        ([("text", "model"), ANSWER], False, False),
        ([("broken", "model"), ANSWER], False, False),
        ([("correction", "environment"), THINK, ANSWER], False, False),
        ([THINK, SEARCH, SHOWN, ("force", "environment"), ANSWER], False, False),
    ],
)
def test_grammars(blocks, loose, strict):
    assert Grammar("(think? search information)* think? answer").fits(blocks) == loose
    assert Grammar(SEARCH_R1_GRAMMAR).fits(blocks) == strict
    (paid,) = format_reward()(Group(EXAMPLE, [trajectory(blocks, streams=2)]))
    assert paid.per_call == {"format": [float(loose)] * 2}
    assert paid.metrics == {"format": float(loose)}


def test_names_are_matched_whole():
    assert not Grammar("answer").fits([("answe", "model"), ("r", "model")])
    assert Grammar("(think | search)* force? answer").fits([SEARCH, THINK, ("force", "environment"), ANSWER])


@pytest.mark.parametrize("grammar", ["think{2}", "(think", "", ".*"])
def test_wrong_grammar(grammar):
    with pytest.raises(ValueError, match="the grammar"):
        Grammar(grammar)


VALID, INVALID = [THINK, SEARCH, SHOWN, THINK, ANSWER], [SEARCH, SHOWN, ANSWER]
HIT, MISS = [Passage("d7", "", "x")], [Passage("d1", "", "y")]


@pytest.mark.parametrize(
    ("blocks", "answer", "passages", "plain", "bonus"),
    [
        (VALID, "ada lovelace.", MISS, 1.0, 1.0),
        (INVALID, "Ada Lovelace", HIT, 0.8, 0.8),
        (VALID, "Bob", MISS, 0.2, 0.2),
        (VALID, "Bob", HIT, 0.2, 0.5),
        (VALID, "Bob", [Passage("d1", "ADA", "the Ada Lovelace, born")], 0.2, 0.5),
        (INVALID, "Bob", HIT, 0.1, 0.1),
        (INVALID, None, HIT, 0.0, 0.0),
        ([THINK, FORGED, THINK, ANSWER], "Bob", (), 0.1, 0.1),
    ],
)
def test_search_r1_rule(blocks, answer, passages, plain, bonus):
    group = Group(EXAMPLE, [trajectory(blocks, answer, passages)])
    (paid,) = search_r1_reward()(group)
    assert paid.per_call["score"] == [pytest.approx(plain)]
    (paid,) = search_r1_reward(retrieval=0.3)(group)
    assert paid.per_call["score"] == [pytest.approx(bonus)]


def test_retrieval_reads_the_searches_not_the_text():
    assert not retrieved(trajectory([FORGED]))
    assert not retrieved(trajectory([SHOWN], passages=MISS))
    assert retrieved(trajectory([SHOWN], passages=HIT))


def test_trajectory_without_blocks_does_not_fit():
    failed = Trajectory(EXAMPLE, streams=[Stream("a", "agent")])
    assert format_reward()(Group(EXAMPLE, [failed]))[0].per_call == {"format": [0.0]}
