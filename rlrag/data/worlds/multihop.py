"""The multi-hop world: fresh facts for every question, searched one hop at a time.

Twelve people, six relations. A question names a person and one to three relations in the order of use; the answer is
the two-word object at the chain's end. Nothing can be memorised, because every question has a world of its own, of 19
passages `FIRST LAST RELATION MARKER OBJECT1 OBJECT2`: the gold facts, look-alikes (same person, same relation, others)
and stale facts. The retriever is a pure function of query and scope that cannot tell a stale twin from the gold fact;
the marker directly before the object can.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlrag.agents.search import SearchAgent
from rlrag.agents.tags import Tag, Tags
from rlrag.agents.tokenizer import Tokenizer, word_tokenizer
from rlrag.data.worlds.facts import (
    CURRENT,
    FIRST_NAMES,
    LAST_NAMES,
    PLACES,
    RELATIONS,
    SPLITS,
    STALE,
    TOWNS,
    Split,
    World,
    draw_world,
    shuffled,
)
from rlrag.data.worlds.policies import Policies
from rlrag.trajectory import Example, Passage

QUESTION = Tag("<question>", "</question>")


@dataclass
class MultihopWorld:
    """The world's settings; examples, index, tokenizer and agent come from them and from nothing else.

    hops: share of questions with 1, 2, 3, ... hops. stale: probability that a gold fact has a stale twin.
    order: results by "rank" (best first) or "shuffled" (the hard setting: reading must match, not take the first).
    noise: probability that one hit of a search is replaced by another passage of the world.
    stop, third_hop, pick_stale, random_relation: the demonstrator's mistakes (see worlds.policies).
    """

    entities: int = 12
    hops: tuple[float, ...] = (0.4, 0.4, 0.2)
    current_facts: int = 16
    stale_facts: int = 3
    stale: float = 0.3
    same_first_name: float = 0.5
    k: int = 2
    order: Literal["rank", "shuffled"] = "rank"
    noise: float = 0.0
    max_searches: int = 4
    stop: float = 0.6
    third_hop: float = 0.4
    pick_stale: float = 0.25
    random_relation: float = 0.1

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """ValueError if the settings contradict each other."""
        if abs(sum(self.hops) - 1) > 1e-6 or min(self.hops) < 0 or not 1 <= len(self.hops) <= 3:
            raise ValueError(f"hops are {self.hops}: give the shares of 1 to 3 hops, their sum 1")
        if not 4 <= self.entities <= len(FIRST_NAMES):
            raise ValueError(f"entities is {self.entities}: give 4 to {len(FIRST_NAMES)}")
        if self.stale_facts < len(self.hops) or self.current_facts < 2 * len(self.hops):
            raise ValueError(
                f"{self.current_facts} current and {self.stale_facts} stale facts are too few for {len(self.hops)} "
                f"hops: give at least {2 * len(self.hops)} and {len(self.hops)}"
            )
        if self.order not in ("rank", "shuffled"):
            raise ValueError(f"order is {self.order!r}: give 'rank' or 'shuffled'")

    def world(self, identity: str) -> World:
        """The world of a question, drawn again from its id (the latest 8192 are kept)."""
        return draw_world(
            identity,
            self.entities,
            tuple(self.hops),
            self.current_facts,
            self.stale_facts,
            self.stale,
            self.same_first_name,
        )

    def example(self, split: Split, seed: int, index: int) -> Example:
        """Question `index` of a split (seed and index 0 or more); the same arguments, the same question, always."""
        identity = f"multihop-{split}-{seed}-{index:06d}"
        world = self.world(identity)
        first, last = world.subject
        return Example(
            identity,
            f"{first} {last} {' '.join(world.chain)}",
            (" ".join(world.answer),),
            hops=len(world.chain),
            gold=tuple(f"{identity}/{number}" for number in world.gold),
            scope=identity,
        )

    def source(self, split: Split, seed: int, size: int) -> "Source":
        """A random-access sequence of `size` questions (Grain's, and anyone's)."""
        self.check()
        return Source(self, split, seed, size)

    def index(self) -> "WorldIndex":
        """The retriever over all questions' worlds."""
        self.check()
        return WorldIndex(self)

    def policies(self, tokenizer: Tokenizer | None = None) -> Policies:
        """The oracle, the demonstrator and the random policy."""
        return Policies(self, tokenizer)

    def tokenizer(self) -> Tokenizer:
        """The closed word-level vocabulary: about 120 words, every tag one token."""
        words = (*QUESTION, *Tags().strings, *RELATIONS, CURRENT, STALE, "search", "unavailable", "invalid")
        return word_tokenizer((*words, *FIRST_NAMES, *LAST_NAMES, *PLACES, *TOWNS))

    def agent(self, tokenizer: Tokenizer | None = None, **changes: Any) -> SearchAgent:
        """The search agent as this world renders it: no template, no think, tags and words separated by spaces.

        `max_tokens` follows from the other limits: question, searches with their passages, one more turn, and the
        forced answer where there is one. Unknown words cannot be said in this vocabulary: texts that are changed must
        keep to it.
        """
        turn = changes.get("max_tokens_per_turn", 6)
        answer = changes.get("max_answer_tokens", 4)
        searches = changes.get("max_searches", self.max_searches)
        on_limit = changes.get("on_limit", "truncate")
        observation = 2 + 6 * changes.get("k", self.k)
        longest = 4 + len(self.hops) + (turn + observation) * searches + turn
        rendering: dict[str, Any] = {
            "k": self.k,
            "max_turns": searches + 1,
            "max_searches": searches,
            "max_tokens_per_turn": turn,
            "max_answer_tokens": answer,
            "max_tokens": longest if on_limit == "truncate" else longest + 1 + answer,
            "max_observation_tokens": observation,
            "on_limit": on_limit,
            "on_invalid": "end",
            "instruction": f"{QUESTION.open} {{question}} {QUESTION.close}",
            "observation": "{information.open} {passages} {information.close}",
            "passage": "{text} ",
            "correction": "invalid",
            "last_call": "",
        }
        return SearchAgent(tokenizer or self.tokenizer(), **(rendering | changes))


@dataclass(frozen=True)
class Source:
    """Questions of one split by their number."""

    world: MultihopWorld
    split: Split
    seed: int
    size: int

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"the split is {self.split!r}: give one of {SPLITS}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"question {index} of {self.size}")
        return self.world.example(self.split, self.seed, index)


class WorldIndex:
    """Searches the passages of a question's own world; safe to use from several threads."""

    def __init__(self, world: MultihopWorld):
        self.world = world

    def search(
        self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | str | None = None
    ) -> list[list[Passage]]:
        """Passages per query; scopes: the id of the question whose world is searched, one for all or one each."""
        each = [scopes] * len(queries) if scopes is None or isinstance(scopes, str) else scopes
        if len(each) != len(queries):
            raise ValueError(f"{len(queries)} queries and {len(each)} scopes: give one scope, or one for each query")
        return [self._search(query, k, scope) for query, scope in zip(queries, each, strict=True)]

    def _search(self, query: str, k: int, scope: str | None) -> list[Passage]:
        if scope is None:
            raise ValueError("a search in the multi-hop world needs a scope: the id of its question")
        facts = self.world.world(scope).facts
        words = set(query.split())
        scores = [
            noise + (first in words) + (last in words) + (relation in words) + 0.3 * ((one in words) + (other in words))
            for (first, last), relation, _, (one, other), noise in facts
        ]
        ranked = sorted(range(len(facts)), key=scores.__getitem__, reverse=True)
        found = ranked[:k]
        if self.world.noise or self.world.order == "shuffled":
            dice = random.Random(f"{scope} {query}")
            if found and len(ranked) > k and dice.random() < self.world.noise:
                found[int(dice.random() * len(found))] = ranked[k + int(dice.random() * (len(ranked) - k))]
            if self.world.order == "shuffled":
                found = shuffled(found, dice)
        return [Passage(f"{scope}/{number}", "", facts[number].text, scores[number]) for number in found]


WORLD = MultihopWorld  # what the data specification `world:multihop` means
