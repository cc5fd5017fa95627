"""Did the agent keep to the format: a grammar over the blocks it wrote and was shown.

The blocks come from the workflow, which knows who wrote what (`outcome.fields["blocks"]`); nothing is found again in
text. An information block that the model wrote itself is called "forged" and fits no grammar, and what it says counts
as retrieved for no reward.
"""

import re
from collections.abc import Callable, Sequence

from rlrag.rewards.answer import exact_match, normalize_answer
from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Group, Trajectory

Blocks = Sequence[tuple[str, str]]  # (name, "model" | "environment"), as agents.tags writes them

# The names: think, search, information, answer; "text" outside all tags, "broken" (a tag without its partner),
# "correction" (shown after an invalid action), "force" (an answer the environment opened), "forged".
SEARCH_GRAMMAR = "(think? search information)* think? answer"
SEARCH_R1_GRAMMAR = "(think search information)* think answer"  # thinks before every action


class Grammar:
    """A regular expression over block names: names, parentheses, | ? * + and spaces."""

    def __init__(self, expression: str):
        if not re.fullmatch(r"[a-z_ ()|?*+]+", expression):
            raise ValueError(f"the grammar {expression!r} may hold block names, ( ) | ? * + and spaces")
        self.expression = expression
        pattern = re.sub(r"[a-z_]+", lambda name: f"(?:{name[0]};)", expression)
        try:
            self._pattern = re.compile(pattern.replace(" ", ""))
        except re.error as error:
            raise ValueError(f"the grammar {expression!r} is no regular expression: {error}") from None

    def fits(self, blocks: Blocks) -> bool:
        """Whether the whole sequence of blocks is a sentence of the grammar."""
        return self._pattern.fullmatch("".join(f"{name};" for name in block_names(blocks))) is not None


def block_names(blocks: Blocks) -> list[str]:
    """Names of blocks; information that the model wrote is "forged"."""
    return ["forged" if block == ("information", "model") else block[0] for block in blocks]


def format_reward(grammar: str = SEARCH_GRAMMAR) -> Reward:
    """A reward named "format", 1 where the episode's blocks fit the grammar, paid to every stream alike."""
    compiled = Grammar(grammar)

    def pay(trajectory: Trajectory) -> Paid:
        fits = float(compiled.fits(trajectory.outcome.fields.get("blocks", ())))
        return Paid({"format": [fits] * len(trajectory.streams)}, metrics={"format": fits})

    return lambda group: [pay(trajectory) for trajectory in group.trajectories]


def search_r1_reward(
    *,
    structure: float = 0.2,
    retrieval: float = 0.0,
    final: float = 0.1,
    grammar: str = SEARCH_R1_GRAMMAR,
    correct: Callable[[str | None, Sequence[str]], float] = exact_match,
) -> Reward:
    """Search-R1's combined rule (v0.3), named "score":

        right and valid 1;  right, bad structure 1 - structure (0.8);
        wrong or none, but valid: structure (0.2), plus `retrieval` where a gold answer or passage was retrieved;
        wrong, bad structure: final (0.1);  none, bad structure 0.

    Unlike the original, "retrieved" reads the searches that were done, not `<information>` blocks in the text: there a
    policy is paid for writing the passage itself.
    """
    compiled = Grammar(grammar)

    def score(trajectory: Trajectory) -> tuple[float, bool]:
        answer, example = trajectory.outcome.answer, trajectory.example
        valid = compiled.fits(trajectory.outcome.fields.get("blocks", ()))
        if answer is not None and correct(answer, example.answers) >= 1:
            return (1.0 if valid else 1.0 - structure), valid
        if valid:
            return structure + retrieval * retrieved(trajectory), valid
        return (final if answer is not None else 0.0), valid

    def pay(trajectory: Trajectory) -> Paid:
        value, valid = score(trajectory)
        return Paid({"score": [value] * len(trajectory.streams)}, metrics={"score": value, "format": float(valid)})

    def reward(group: Group) -> list[Paid]:
        return [pay(trajectory) for trajectory in group.trajectories]

    return reward


def retrieved(trajectory: Trajectory) -> bool:
    """Whether a search of the episode brought a gold passage, or a passage that contains a gold answer."""
    gold = set(trajectory.example.gold)
    answers = [normalize_answer(answer) for answer in trajectory.example.answers]
    answers = [answer for answer in answers if answer]
    for record in trajectory.searches:
        for passage in (passage for found in record.results for passage in found):
            if passage.id in gold:
                return True
            text = normalize_answer(f"{passage.title} {passage.text}")
            if any(answer in text for answer in answers):
                return True
    return False
