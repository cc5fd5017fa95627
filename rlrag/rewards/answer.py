"""Is the answer right: exact match, F1 and containment as the published evaluation scripts count them.

The normaliser and scores are those of SQuAD's evaluate-v2.0.py, which MuSiQue, NQ-open and Search-R1 share;
HotpotQA and 2WikiMultiHopQA differ in F1 only (`rule="hotpotqa"`). Each score is the best over the gold answers, and a
prediction of None (the episode gave no answer) scores 0. Supporting-fact and joint scores are deliberately absent:
nothing here predicts supporting facts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Group, Trajectory

Metric = Literal["em", "f1", "contains"]
F1Rule = Literal["squad", "hotpotqa"]

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the scripts: "–" and "…" stay
_CLOSED = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, then the words a, an, the, then squeeze white space (in this order)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised gold answer, else 0."""
    return _best(_exact_match, prediction, golds)


def contains(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if a normalised gold answer is a substring of the normalised prediction, else 0.

    Two warnings for its use as a reward: a long prediction contains more, and a gold answer that normalises to
    nothing ("The") is contained in everything; the published scripts count both so.
    """
    return _best(_contains, prediction, golds)


def f1(prediction: str | None, golds: Sequence[str], *, rule: F1Rule = "squad") -> float:
    """Harmonic mean of token precision and recall, tokens counted with multiplicity.

    rule "squad": two answers that normalise to nothing are equal, so 1.
    rule "hotpotqa": 0 where one side is yes, no or noanswer and the two differ, and 0 where nothing is shared, also
    for two empty answers.
    """
    if rule not in get_args(F1Rule):
        raise ValueError(f"F1 rule is {rule!r}: give one of {', '.join(get_args(F1Rule))}")
    return _best(_f1_squad if rule == "squad" else _f1_hotpotqa, prediction, golds)


def answer_reward(metric: Metric = "em", *, rule: F1Rule = "squad") -> Reward:
    """A reward named "answer": the metric of the final answer, paid to every stream of the trajectory alike.

    All three metrics come back for logging. Who shares the credit among streams is the recipe's affair, not this one's.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"answer reward metric is {metric!r}: give one of {', '.join(get_args(Metric))}")

    def pay(trajectory: Trajectory) -> Paid:
        prediction, golds = trajectory.outcome.answer, trajectory.example.answers
        if not golds:
            raise ValueError(f"example {trajectory.example.id!r} has no gold answers: leave it out of the data")
        scores = {
            "em": exact_match(prediction, golds),
            "f1": f1(prediction, golds, rule=rule),
            "contains": contains(prediction, golds),
        }
        return Paid(per_call={"answer": [scores[metric]] * len(trajectory.streams)}, metrics=scores)

    def reward(group: Group) -> list[Paid]:
        return [pay(trajectory) for trajectory in group.trajectories]

    return reward


def _best(score, prediction: str | None, golds: Sequence[str]) -> float:
    if isinstance(golds, str):  # would be scored letter by letter
        raise ValueError(f"gold answers are the string {golds!r}: give a sequence of strings")
    if not golds:
        raise ValueError("there are no gold answers to score against: give at least one")
    if prediction is None:
        return 0.0
    normalized = normalize_answer(prediction)
    return max(float(score(normalized, normalize_answer(gold))) for gold in golds)


def _exact_match(prediction: str, gold: str) -> bool:
    return prediction == gold


def _contains(prediction: str, gold: str) -> bool:
    return gold in prediction


def _f1_squad(prediction: str, gold: str) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    return _token_f1(prediction, gold)


def _f1_hotpotqa(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _CLOSED or gold in _CLOSED):
        return 0.0
    return _token_f1(prediction, gold)


def _token_f1(prediction: str, gold: str) -> float:
    prediction_tokens, gold_tokens = prediction.split(), gold.split()
    num_same = sum((Counter(prediction_tokens) & Counter(gold_tokens)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(prediction_tokens), num_same / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)
