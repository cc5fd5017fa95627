import gzip
import json

import pytest

from rlrag.rewards.number import last_number, marked_number, number_reward
from rlrag.trajectory import Example, Group, Outcome, Stream, Trajectory
from tests.shared_data import SHARED


def score(text, gold, lenient=False):
    example = Example("q", "?", (gold,))
    trajectory = Trajectory(example, streams=[Stream("agent", "agent")], outcome=Outcome(text))
    (paid,) = number_reward(lenient)(Group(example, [trajectory]))
    return paid.per_call["answer"][0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 1,000", "1000"), ("#### -5", "-5"), ("####7", "[invalid]"), ("#### 3.50", "3.50"), ("no", "[invalid]"),
     ("x\n#### 12.", "12."), ("#### 1 #### 2", "1")],
)  # fmt: skip
def test_the_official_rule(text, number):
    assert marked_number(text) == number


def test_the_published_scores_where_the_data_are():
    """Real model solutions with their published flags; without the shared data the cases above stand alone."""
    golden = SHARED / "golden"
    if not golden.is_dir():
        return
    expected = json.loads((golden / "gsm8k_expected.json").read_text())
    for case in expected["edge_cases"]:
        assert marked_number(case["completion"]) == case["extracted"]
    with gzip.open(golden / "gsm8k_items.jsonl.gz", "rt") as file:
        items = [json.loads(line) for line in file]
    name = next(name for name in items[0] if "solution" in name or "completion" in name)
    scores = [score(item[name], item["answer"]) for item in items]
    assert sum(scores) / len(scores) == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize(
    ("text", "gold", "strict", "lenient"),
    [("so 5\n#### 5", "5", 1, 1), ("it is 5", "5", 0, 1), ("#### 5", "a #### 5", 1, 1), ("3.50", "3.5", 0, 1),
     ("#### 1,000", "1000", 1, 1), ("none", "5", 0, 0), (None, "5", 0, 0), ("#### 5", "6", 0, 0)],
)  # fmt: skip
def test_strict_and_lenient(text, gold, strict, lenient):
    assert (score(text, gold), score(text, gold, lenient=True)) == (strict, lenient)


def test_the_last_number():
    assert last_number("1,234.5 and -7") == -7
    assert last_number("none") is None
