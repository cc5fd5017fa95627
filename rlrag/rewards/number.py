"""Is the final number right: GSM8K's own rule, and a lenient one for answers in free form."""

import re
from collections.abc import Sequence

from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Trajectory

INVALID = "[invalid]"
_MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def marked_number(text: str) -> str:
    """What follows "#### ", without commas, as text; "[invalid]" where nothing does (Cobbe et al. 2021, the released
    dataset.py: "3.50" is not "3.5")."""
    found = _MARKED.search(text)
    return found[1].strip().replace(",", "") if found else INVALID


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number_reward(lenient: bool = False) -> Reward:
    """A reward named "answer": 1 where the number of the answer is that of a gold answer, paid to every stream alike.

    Strict: both written as "#### N" (a gold answer that is N alone counts as that). lenient: the last numbers of both.
    """

    def right(prediction: str | None, golds: Sequence[str]) -> float:
        if prediction is None:
            return 0.0
        if lenient:
            number = last_number(prediction)
            return float(number is not None and any(number == last_number(gold) for gold in golds))
        number = marked_number(prediction)
        wanted = {marked_number(gold) if "####" in gold else gold.replace(",", "") for gold in golds}
        return float(number != INVALID and number in wanted)

    def pay(trajectory: Trajectory) -> Paid:
        score = right(trajectory.outcome.answer, trajectory.example.answers)
        return Paid({"answer": [score] * len(trajectory.streams)}, metrics={"em": score})

    return lambda group: [pay(trajectory) for trajectory in group.trajectories]
