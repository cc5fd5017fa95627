"""Retrieved passages as observed tokens: formatted, defused, cut to a limit with the closing tag always kept."""

import re

from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import Tokenizer
from rlrag.trajectory import Passage


class Observations:
    """Renders what a search returned.

    layout: text with {passages} and the tags, such as "\\n\\n{information.open}{passages}{information.close}\\n\\n".
    passage: one passage, with {i} (from 1), {title} and {text}.
    unavailable: what stands in place of passages when the search failed; never nothing, the policy must see it.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Tags, *, layout: str, passage: str, unavailable: str):
        head, tail = fill(layout, tags, passages="\0").split("\0")
        self.tokenizer, self.passage, self.unavailable = tokenizer, passage, unavailable
        self.head, self.tail = head, tail
        self.head_ids, self.tail_ids = tokenizer.encode(head), tokenizer.encode(tail)
        self._control = re.compile("|".join(map(re.escape, {*tags.strings, *tokenizer.special})))

    @property
    def least(self) -> int:
        """Tokens of an observation with nothing in it."""
        return len(self.head_ids) + len(self.tail_ids)

    def defuse(self, text: str) -> str:
        """Text that others wrote, unable to open or close a tag or to become a control token.

        `</information>` in a document becomes `< /information>`: readable, visible, and no longer a tag.
        """
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def render(self, passages: list[Passage], limit: int, *, failed: bool = False) -> list[int]:
        """Ids of an observation, at most `limit` (>= `least`): what is too long is cut from its end, tags never."""
        if failed:
            parts = [self.unavailable]
        else:
            parts = [
                self.defuse(self.passage.format(i=i, title=found.title, text=found.text))
                for i, found in enumerate(passages, start=1)
            ]
        ids = self.tokenizer.encode(f"{self.head}{''.join(parts).strip()}{self.tail}")
        if len(ids) <= limit:
            return ids
        assert limit >= self.least, f"an observation needs {self.least} tokens, the limit is {limit}"
        kept = list(self.head_ids)
        room = limit - self.least
        for part in parts:  # whole passages while they fit, then the beginning of the next one
            piece = self.tokenizer.encode(part)[:room]
            kept += piece
            room -= len(piece)
        return kept + self.tail_ids


def fill(layout: str, tags: Tags, **values: str) -> str:
    """Put the tags ({search.open}, {answer.close}, ...) and values into a layout; braces of its own are doubled."""
    return layout.format(
        think=tags.think, search=tags.search, information=tags.information, answer=tags.answer, **values
    )
