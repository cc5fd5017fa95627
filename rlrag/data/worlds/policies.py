"""Scripted policies of the multi-hop world: an oracle, a random one, and a demonstrator that errs on purpose.

They see what a model sees: the question and the passages their own searches returned. A script belongs to one episode
(it counts its hops and owns its dice) and runs under `drive`, the engine, or any other driver.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Episode, Generate, Script
from rlrag.data.worlds.facts import CURRENT, FIRST_NAMES, LAST_NAMES, PLACES, RELATIONS, STALE, TOWNS
from rlrag.trajectory import Example, Passage

if TYPE_CHECKING:
    from rlrag.data.worlds.multihop import MultihopWorld

_TAGS = Tags()


class Policies:
    """Scripts for one world and its tokenizer."""

    def __init__(self, world: "MultihopWorld", tokenizer: Tokenizer | None = None):
        self.world = world
        self.tokenizer = tokenizer or world.tokenizer()

    def oracle(self, example: Example) -> Script:
        """Follows the chain: one search a hop, reads the current fact, answers with the last object."""
        return _Walk(self, example, None)

    def demonstrator(self, example: Example, seed: int) -> Script:
        """The oracle with four kinds of mistakes, drawn independently of the question, so that RL has room.

        After a hop that is not the last it answers with the bridge (probability `stop`); before a third hop it gives up
        once more (1 - `third_hop`); it reads a stale twin it sees (`pick_stale`); from the second query on it asks for
        a random relation (`random_relation`). Where stopping has more than 0.5 the greedy policy stops after one
        search, and RL must turn the mode, not sharpen it.
        """
        return _Walk(self, example, random.Random(f"{example.id} {seed}"))

    def random_policy(self, example: Example, seed: int) -> Script:
        """Zero to `max_searches` random searches, then a random name or place: the floor of every result."""
        dice = random.Random(f"{example.id} {seed}")
        queries = int(dice.random() * (self.world.max_searches + 1))

        def script(episode: Episode, request: Generate) -> tuple[Sequence[int], str]:
            if len(episode.trajectory.searches) < queries and _TAGS.search.close in request.stop:
                query = f"{_pick(dice, FIRST_NAMES)} {_pick(dice, LAST_NAMES)} {_pick(dice, RELATIONS)}"
                return self._search(query)
            one, other = (FIRST_NAMES, LAST_NAMES) if dice.random() < 0.5 else (PLACES, TOWNS)
            return self._answer(f"{_pick(dice, one)} {_pick(dice, other)}", request)

        return script

    def _search(self, query: str) -> tuple[Sequence[int], str]:
        text = f"{_TAGS.search.open} {query} {_TAGS.search.close}"
        return self.tokenizer.encode(text), text

    def _answer(self, answer: str, request: Generate) -> tuple[Sequence[int], str]:
        if _TAGS.search.close in request.stop:
            text = f"{_TAGS.answer.open} {answer} {_TAGS.answer.close}"
        else:  # the opening was observed: a forced answer
            text = f"{answer} {_TAGS.answer.close}"
        return self.tokenizer.encode(text), text


def _pick(dice: random.Random, options: Sequence[str]) -> str:
    return options[int(dice.random() * len(options))]


class _Walk:
    """One episode of following the chain; without dice it makes no mistakes."""

    def __init__(self, policies: Policies, example: Example, dice: random.Random | None):
        first, last, *chain = example.question.split()
        self.policies, self.dice, self.chain = policies, dice, chain
        self.subject = f"{first} {last}"  # who the next query asks about; in the end, the answer
        self.asked = ""  # the query whose passages come next
        self.hop = 0

    def __call__(self, episode: Episode, request: Generate) -> tuple[Sequence[int], str]:
        searches = episode.trajectory.searches
        if self.asked and searches:
            self.subject = self._read(searches[-1].results[0] if searches[-1].results else [])
            self.hop += 1
        if self._stops() or _TAGS.search.close not in request.stop:
            return self.policies._answer(self.subject, request)
        self.asked = f"{self.subject} {self._relation()}"
        return self.policies._search(self.asked)

    def _read(self, passages: Sequence[Passage]) -> str:
        """The object of the passage that answers the query; of the first one where none does."""
        matching = {}  # by marker, the best first
        asked = self.asked.split()
        for passage in passages:
            words = passage.text.split()
            if words[:3] == asked:
                matching.setdefault(words[3], f"{words[4]} {words[5]}")
        stale, current = matching.get(STALE), matching.get(CURRENT)
        if stale and self._errs(self.policies.world.pick_stale):
            return stale
        if current or stale:
            return current or stale or ""
        return " ".join(passages[0].text.split()[4:6]) if passages else self.subject

    def _stops(self) -> bool:
        if self.hop >= len(self.chain):
            return True
        world = self.policies.world
        return (self.hop > 0 and self._errs(world.stop)) or (self.hop == 2 and self._errs(1 - world.third_hop))

    def _relation(self) -> str:
        if self.hop > 0 and self._errs(self.policies.world.random_relation):
            assert self.dice is not None
            return _pick(self.dice, RELATIONS)
        return self.chain[self.hop]

    def _errs(self, probability: float) -> bool:
        return self.dice is not None and self.dice.random() < probability
