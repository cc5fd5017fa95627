"""Scripted policies over real passages: demonstrations built from the gold ones, the oracle, and the random policy.

A script drives the agent itself, so a demonstration is rendered token by token as a rollout would be. It writes what
could be known at that point: the next query names a gold passage whose title the question or a passage seen so far
mentions. Scripts belong to one episode (they own their dice) and never write more than a request allows.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlrag.agents.search import SearchAgent
from rlrag.agents.workflow import Episode, Generate, Script, drive
from rlrag.trajectory import Example, Passage, Trajectory

FIRST = (
    "I should look this up.",
    "Let me search for it.",
    "I need to find {target} first.",
    "The question is about {target}.",
    "What is known about {target}?",
)
NEXT = (
    "That is one part. I still need {target}.",
    "Next I need {target}.",
    "Now I should look for {target}.",
    "This leads to {target}.",
)
LAST = (
    "Now I can answer.",
    "That is enough to answer.",
    "I know the answer now.",
    "The facts are together.",
)

ABOUT = (
    "Who or what is {title}?",
    "What is known about {title}?",
    "When and where did {title} begin?",
    "Which country is {title} from?",
    "Where does {title} come from, and when?",
)
SearchFunction = Callable[[Sequence[str], int, str | None], list[list[Passage]]]
Turn = tuple[Sequence[int], str]  # what a script writes: tokens, and their text


@dataclass(frozen=True)
class Mistakes:
    """Probabilities of what a demonstration does wrong on purpose, so that reinforcement has something to mend.

    stop: after a hop that is not the last, give up and answer with a title. skip: leave a hop out. title: answer with
    the title of a passage although the answer is known. question: ask for a hop with the question's own words.
    """

    stop: float = 0.15
    skip: float = 0.1
    title: float = 0.1
    question: float = 0.4


class Traces:
    """Scripts for one agent and its corpus; `passages` by id, of the gold ones at least. brief: the share of
    demonstrations that are a first turn alone."""

    def __init__(
        self,
        agent: SearchAgent,
        passages: Mapping[str, Passage],
        mistakes: Mistakes | None = None,
        brief: float = 0.75,
    ):
        self.agent, self.passages = agent, passages
        self.opening = replace(agent, max_turns=1, on_limit="truncate")
        self.mistakes, self.brief = mistakes or Mistakes(), brief
        self._drawn = [passage for passage in passages.values() if passage.title and passage.text]

    def demonstrator(self, example: Example, number: int) -> Script:
        """Think, search for each gold passage in hop order, answer with the gold answer; `mistakes` on the way.

        Dice are seeded by the example's id and the number, and by nothing else.
        """
        return _Trace(self, example, random.Random(f"{example.id} {number}"), self.mistakes)

    def demonstrate(self, example: Example, number: int, search: SearchFunction) -> Trajectory:
        """The demonstrator's episode; or, with probability `brief`, the first turn of one about a random passage.

        A model from scratch has to learn to copy before anything else. First turns teach it at a fifth of the tokens,
        and a few hundred questions alone would be learned by heart.
        """
        dice = random.Random(f"brief {example.id} {number}")
        if dice.random() >= self.brief:
            return drive(self.agent, example, self.demonstrator(example, number), search)
        passage = self._drawn[int(dice.random() * len(self._drawn))]
        about = replace(example, question=invented_question(passage, dice), gold=(passage.id,))
        return drive(self.opening, about, self.demonstrator(about, number), search)

    def oracle(self, example: Example) -> Script:
        """Searches for every gold title, answers right if that brought every gold passage, and else with a title.

        Its recall is what good queries bring, its EM the share of questions for which they bring all evidence.
        """
        return _Trace(self, example, None, Mistakes(0, 0, 0, 0))

    def random_policy(self, example: Example, answers: Sequence[str]) -> Script:
        """A search for some of the question's words, then one of `answers`: the floor of every result."""
        dice = random.Random(example.id)
        words = example.question.split()
        first = dice.randrange(len(words))

        def script(episode: Episode, request: Generate) -> Turn:
            if not episode.trajectory.searches and self.may_search(episode, request):
                return self.search("", " ".join(words[first : first + 3]), request)
            return self.answer("", dice.choice(answers), request)

        return script

    def may_search(self, episode: Episode, request: Generate) -> bool:
        """Whether a search written now would be done and its result read."""
        done, agent = len(episode.trajectory.searches), self.agent
        return agent.tags.search.close in request.stop and done < min(agent.max_searches, agent.max_turns - 1)

    def search(self, thought: str, query: str, request: Generate) -> Turn:
        tag = self.agent.tags.search
        return self._write(thought, tag.open, query, tag.close, request.limit)

    def answer(self, thought: str, answer: str, request: Generate) -> Turn:
        tag = self.agent.tags.answer
        if self.agent.tags.search.close in request.stop:
            return self._write(thought, tag.open, answer, tag.close, request.limit)
        return self._write("", "", answer, tag.close, request.limit)  # the opening was observed: a forced answer

    def _write(self, thought: str, opening: str, content: str, closing: str, limit: int) -> Turn:
        """A turn of at most `limit` tokens: the thought is left out first, then words from the end of the content."""
        think = self.agent.tags.think
        before = f"{think.open} {self.plain(thought)}{think.close}" if thought else ""
        words = self.plain(content).split()
        while True:
            text = f"{before}{opening}{''.join(f' {word}' for word in words)}{closing}"
            tokens = self.agent.tokenizer.encode(text)
            if len(tokens) <= limit or not (before or words):
                return tokens[:limit], text
            if before:
                before = ""
            else:
                words.pop()

    @staticmethod
    def plain(text: str) -> str:
        """Text without anything that could be read as a tag or a control token."""
        return " ".join(text.replace("<", " ").split())


class _Trace:
    """One episode along the gold passages; without dice it makes no mistakes."""

    def __init__(self, traces: Traces, example: Example, dice: random.Random | None, mistakes: Mistakes):
        self.traces, self.example, self.dice, self.mistakes = traces, example, dice, mistakes
        gold = [traces.passages[id] for id in example.gold if id in traces.passages]
        self.left = hop_order(example.question, gold)
        if len(self.left) > 1 and self._errs(mistakes.skip):
            self.left.pop(self._pick(range(len(self.left))))
        self.asked: list[str] = []

    def __call__(self, episode: Episode, request: Generate) -> Turn:
        found = [p for record in episode.trajectory.searches for passages in record.results for p in passages]
        ids = {passage.id for passage in found}
        self.left = [passage for passage in self.left if passage.id not in ids]
        gives_up = bool(found and self.left) and self._errs(self.mistakes.stop)
        if not gives_up and self.traces.may_search(episode, request):
            query, target = self._query(found)
            if query:
                self.asked.append(query)
                thought = self._pick(NEXT if found else FIRST).format(target=target)
                return self.traces.search(thought, query, request)
        return self.traces.answer(self._pick(LAST), self._answer(ids, found, gives_up), request)

    def _query(self, found: Sequence[Passage]) -> tuple[str, str]:
        """What to ask next, and what a thought calls it; empty when there is nothing left to ask.

        A title that nothing seen so far mentions could only be guessed: the question's words stand in for it, once.
        """
        question = self.example.question
        if not self.asked and not self.left:
            return question, "it"  # no gold passage is known
        while self.left:
            target = self.left[0]
            known = mentions(" ".join([question, *(passage.text for passage in found)]), target.title)
            by_title = self.dice is None or (known and not self._errs(self.mistakes.question))
            query = target.title if by_title else question
            if query not in self.asked:
                return query, target.title if known else "it"
            query = target.title
            if query not in self.asked and known:
                return query, target.title
            self.left.pop(0)  # both were asked: retrieval does not bring it
        return "", ""

    def _answer(self, ids: set[str], found: Sequence[Passage], gives_up: bool) -> str:
        if self.dice is None:
            knows = ids.issuperset(self.example.gold)
        else:
            knows = not gives_up and not self._errs(self.mistakes.title)
        if knows or not found:
            return self.example.answers[0]
        return found[-1].title if self.dice is None else self._pick(found).title

    def _errs(self, probability: float) -> bool:
        return self.dice is not None and self.dice.random() < probability

    def _pick(self, options):
        return options[0] if self.dice is None else options[int(self.dice.random() * len(options))]


def invented_question(passage: Passage, dice: random.Random) -> str:
    """Something to ask about a passage: its title in a question, or some of its words with the title before them."""
    if dice.random() < 0.5:
        return dice.choice(ABOUT).format(title=passage.title)
    words = passage.text.split()
    count = dice.randint(4, 20)
    start = int(dice.random() * max(1, len(words) - count))
    return f"{passage.title} {' '.join(words[start : start + count])}?"


def hop_order(question: str, passages: Sequence[Passage]) -> list[Passage]:
    """Passages in an order in which they can be found: each time the first whose title is mentioned by the question or
    a passage before it. (MuSiQue lists its hops in order; HotpotQA and 2Wiki list them in any.)"""
    left, ordered, seen = list(passages), [], question
    while left:
        following = next((passage for passage in left if mentions(seen, passage.title)), left[0])
        left.remove(following)
        ordered.append(following)
        seen = f"{seen} {following.text}"
    return ordered


def mentions(text: str, title: str) -> bool:
    """Whether a text names a title, an explanation in parentheses at its end left out: "Kiss (band)" by "Kiss"."""
    name = title.split(" (")[0].casefold().strip()
    return bool(name) and name in text.casefold()
