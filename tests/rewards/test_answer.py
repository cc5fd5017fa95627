import math

import pytest

from rlrag.rewards.answer import answer_reward, contains, exact_match, f1, normalize_answer
from rlrag.trajectory import Example, Group, Outcome, Stream, Trajectory
from tests.shared_data import FIXTURES, present, read_json

PAIRS = [FIXTURES / "answer_pairs.jsonl", *present("golden/answer_pairs.jsonl")]


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.parent.name)
def test_equals_squad_and_hotpotqa_scripts(path):
    rows = read_json(path)
    assert len(rows) >= 10
    for row in rows:
        prediction, golds = row["prediction"], row["golds"]
        assert normalize_answer(prediction) == row["normalized"], row
        assert exact_match(prediction, golds) == row["squad_v2"]["em"] == row["hotpot"]["em"], row
        assert math.isclose(f1(prediction, golds), row["squad_v2"]["f1"], abs_tol=1e-12), row
        assert math.isclose(f1(prediction, golds, rule="hotpotqa"), row["hotpot"]["f1"], abs_tol=1e-12), row
        assert contains(prediction, golds) == row["sub_em"], row


def _llm_answers():
    rows = read_json(present("golden/hotpot_llm_answers.jsonl.gz")[0])
    expected = read_json(present("golden/hotpot_llm_answers_expected.json")[0])["mean"]
    for row in rows:
        assert exact_match(row["prediction"], [row["gold"]]) == row["em"]
        assert math.isclose(f1(row["prediction"], [row["gold"]], rule="hotpotqa"), row["f1"], abs_tol=1e-12)
    pairs = [(row["prediction"], [row["gold"]]) for row in rows]
    return pairs, "hotpotqa", (expected["em"], expected["f1"], expected["acc"]), 1e-12


def _hotpotqa():
    gold = read_json(present("multihop/hotpot_dev_distractor_v1.sample.json")[0])
    answers = read_json(present("golden/hotpot_predictions.json")[0])["answer"]
    expected = read_json(present("golden/hotpot_expected.json")[0])["metrics"]
    pairs = [(answers.get(row["_id"]), [row["answer"]]) for row in gold]
    return pairs, "hotpotqa", (expected["em"], expected["f1"], expected["acc"]), 1e-12


def _two_wiki():
    gold = read_json(present("multihop/2wikimultihopqa_dev.sample.json")[0])
    answers = read_json(present("golden/2wiki_predictions.json")[0])["answer"]
    aliases = {
        row["Q_id"]: row["aliases"] + row["demonyms"] for row in read_json(present("golden/2wiki_id_aliases.jsonl")[0])
    }
    expected = read_json(present("golden/2wiki_expected.json")[0])["metrics"]
    pairs = [(answers[row["_id"]], [row["answer"], *aliases.get(row["answer_id"], [])]) for row in gold]
    return pairs, "hotpotqa", tuple(expected[name] / 100 for name in ("em", "f1", "acc")), 5.1e-5  # 2 decimals of %


def _musique():
    gold = read_json(present("multihop/musique_ans_v1.0_dev.sample.jsonl.gz")[0])
    answers = {r["id"]: r["predicted_answer"] for r in read_json(present("golden/musique_predictions.jsonl")[0])}
    expected = read_json(present("golden/musique_expected.json")[0])["metrics"]
    pairs = [(answers[row["id"]], [row["answer"], *row["answer_aliases"]]) for row in gold]
    return pairs, "squad", tuple(expected[f"answer_{name}"] for name in ("em", "f1", "acc")), 5.1e-4  # 3 decimals


def _by_hand():
    """Four questions, one without an answer: em 1/4, f1 (1 + 2/3)/4, contains 2/4."""
    pairs = [("Marn", ["marn"]), ("in old Marn town", ["Marn town"]), (None, ["x"]), ("no", ["yes"])]
    return pairs, "squad", (1 / 4, (1 + 2 / 3) / 4, 2 / 4), 1e-12


@pytest.mark.parametrize(
    "source", [_by_hand, *([_llm_answers, _hotpotqa, _two_wiki, _musique] if present("golden") else [])]
)
def test_means_equal_the_official_evaluation(source):
    pairs, rule, (em, f1_mean, contained), tolerance = source()
    mean = lambda score: sum(score(*pair) for pair in pairs) / len(pairs)  # noqa: E731
    assert mean(exact_match) == pytest.approx(em, abs=tolerance)
    assert mean(lambda *pair: f1(*pair, rule=rule)) == pytest.approx(f1_mean, abs=tolerance)
    assert mean(contains) == pytest.approx(contained, abs=tolerance)


def test_no_prediction_scores_zero_even_against_an_empty_gold():
    assert exact_match(None, [""]) == f1(None, [""]) == contains(None, [""]) == 0.0


def test_user_errors_name_the_value():
    with pytest.raises(ValueError, match="string 'Marn'"):
        exact_match("M", "Marn")
    with pytest.raises(ValueError, match="at least one"):
        f1("M", [])
    with pytest.raises(ValueError, match=r"'bleu'.*squad, hotpotqa"):
        f1("M", ["M"], rule="bleu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'rouge'.*em, f1, contains"):
        answer_reward("rouge")  # pyright: ignore[reportArgumentType]
    lonely = Group(Example("q7", "?", ()), [Trajectory(Example("q7", "?", ()))])
    with pytest.raises(ValueError, match="'q7' has no gold answers"):
        answer_reward()(lonely)


@pytest.mark.parametrize(("metric", "paid"), [("em", [0.0, 1.0, 0.0]), ("f1", [2 / 3, 1.0, 0.0])])
def test_reward_pays_every_stream_the_same(metric, paid):
    example = Example("q", "Where?", ("Marn town",))
    trajectories = [
        Trajectory(
            example,
            sample=sample,
            streams=[Stream(str(n), "agent") for n in range(sample + 1)],
            outcome=Outcome(answer),
        )
        for sample, answer in enumerate(["in old Marn town", "Marn town!", None])
    ]
    rewards = answer_reward(metric)(Group(example, trajectories))
    assert [reward.per_call for reward in rewards] == [
        {"answer": [pytest.approx(value)] * (sample + 1)} for sample, value in enumerate(paid)
    ]
    assert [reward.metrics["em"] for reward in rewards] == [0.0, 1.0, 0.0]
    assert [reward.metrics["contains"] for reward in rewards] == [1.0, 1.0, 0.0]
    assert rewards[0].metrics["f1"] == pytest.approx(2 / 3)
    assert not any(reward.per_token for reward in rewards)
