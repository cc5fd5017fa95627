"""The search agent: one growing stream of thinking, searching, reading and answering.

A turn is one generation. Its action is its first closed search or answer: a search is followed by its passages inside
`<information>`, an answer ends the episode, anything else is an invalid action. Every limit has a name and an end
that is defined: one last answer, or status `truncated`.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from rlrag.agents.chat import Chat, Plain
from rlrag.agents.observation import Observations, fill
from rlrag.agents.tags import ENVIRONMENT, Action, Block, Tags, label_tokens
from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Found, Generate, Mode, Reply, Search, Steps
from rlrag.trajectory import TRUNCATED, Example, Outcome

INSTRUCTION = (
    "Answer the question below. Whenever you learn something new, think about it between {think.open} and "
    "{think.close}. While a fact is missing, ask the search engine for it with {search.open} query {search.close}: "
    "what it finds is shown between {information.open} and {information.close}. Search as often as needed, then give a "
    "short final answer without explanation, for example {answer.open} Paris {answer.close}. Question: {question}\n"
)
CORRECTION = (
    "\nThat was neither a search nor an answer. A query goes between {search.open} and {search.close}, the final "
    "answer between {answer.open} and {answer.close}. I will try again.\n"
)
LAST_CALL = "\nNo more searches are possible. The final answer goes between {answer.open} and {answer.close}.\n"

OnLimit = Literal["force_answer", "free_answer", "truncate"]
OnInvalid = Literal["correct", "force_answer", "end"]
OnLongTurn = Literal["limit", "invalid"]


@dataclass(frozen=True)
class SearchAgent:
    """The agent's options; an instance is the workflow: `agent(example, mode)`.

    Limits, each ending the episode as `on_limit` says (fields["limit"] names the one that did):
      max_turns             generations, the last answer that `on_limit` grants not counted
      max_searches          searches done; the next one asked for is not done
      max_tokens_per_turn   tokens of one generation (see `on_long_turn`)
      max_tokens            tokens of the stream, prompt and observations included: never exceeded, so that rows and
                            cache can be sized by it
      max_answer_tokens     tokens kept free for the last answer
      max_observation_tokens  ends nothing: a longer observation is cut, its closing tag kept

    on_limit: "force_answer" observes `force` (the opening of an answer) and generates up to its closing;
      "free_answer" is one more turn whose search is not done (Search-R1); "truncate" gives no answer.
    on_invalid: "correct" observes `correction` and goes on (the turn counts); "force_answer" as above, the limit then
      reads "invalid"; "end" ends without an answer.
    on_long_turn: a turn cut at max_tokens_per_turn is a "limit", or an "invalid" action (Search-R1).

    Outcome fields: turns, searches, invalid_turns, limit, blocks [(name, "model" | "environment")].
    """

    tokenizer: Tokenizer
    _: KW_ONLY
    tags: Tags = field(default_factory=Tags)
    chat: Chat | None = None  # None: no template
    k: int = 3  # passages of a search
    max_turns: int = 5
    max_searches: int = 4
    max_tokens_per_turn: int = 500
    max_tokens: int = 4096
    max_answer_tokens: int = 64
    max_observation_tokens: int = 500
    on_limit: OnLimit = "force_answer"
    on_invalid: OnInvalid = "correct"
    on_long_turn: OnLongTurn = "limit"
    instruction: str = INSTRUCTION
    correction: str = CORRECTION
    last_call: str = LAST_CALL
    force: str = "{answer.open}"
    observation: str = "\n\n{information.open}{passages}{information.close}\n\n"
    passage: str = "Doc {i}(Title: {title}) {text}\n"
    unavailable: str = "search unavailable"
    stream: str = "agent"
    role: str = "agent"
    _texts: "_Texts" = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("k", "max_turns", "max_tokens_per_turn", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"the search agent's {name} is {getattr(self, name)}: give 1 or more")
        for name, allowed in (("on_limit", OnLimit), ("on_invalid", OnInvalid), ("on_long_turn", OnLongTurn)):
            if getattr(self, name) not in allowed.__args__:
                raise ValueError(f"the search agent's {name} is {getattr(self, name)!r}: give {allowed.__args__}")
        object.__setattr__(self, "_texts", _Texts(self))
        least = self._texts.observations.least
        if self.max_observation_tokens < least:
            raise ValueError(
                f"max_observation_tokens is {self.max_observation_tokens}: the tags of an observation alone are {least}"
            )

    def __call__(self, example: Example, mode: Mode) -> Steps:
        return _Run(self, self._texts).steps(example)


class _Texts:
    """What an agent says in every episode, encoded once."""

    def __init__(self, agent: SearchAgent):
        tokenizer, tags = agent.tokenizer, agent.tags
        self.chat = agent.chat or Plain(tokenizer)
        self.token_bytes = list(tokenizer.token_bytes())
        self.token_bytes[tokenizer.end_id] = b""  # ends a turn and is no text of it
        self.before, self.after = fill(agent.instruction, tags, question="\0").split("\0")
        self.observations = Observations(
            tokenizer, tags, layout=agent.observation, passage=agent.passage, unavailable=agent.unavailable
        )
        self.correction = tokenizer.encode(fill(agent.correction, tags))
        self.last_call = tokenizer.encode(fill(agent.last_call, tags))
        self.force = tokenizer.encode(fill(agent.force, tags))
        # Tokens no turn and no observation may use, so that the last answer always has its room.
        self.reserve = 0
        if agent.on_limit != "truncate" or agent.on_invalid == "force_answer":
            spoken = self.chat.frame + len(self.last_call)
            self.reserve = agent.max_answer_tokens + len(self.force) + spoken


class _Run:
    """One episode of the agent."""

    def __init__(self, agent: SearchAgent, texts: _Texts):
        self.agent, self.texts = agent, texts
        self.used = 0  # tokens of the stream
        self.allowance = 0  # tokens the current generation may take
        self.append: list[int] = []  # observed, not yet in the stream
        self.ended = False  # the last reply sampled the end token
        self.turns = self.searches = self.invalid_turns = 0
        self.limit: str | None = None
        self.blocks: list[Block] = []

    @property
    def room(self) -> int:
        """Tokens left for turns and observations."""
        return self.agent.max_tokens - self.texts.reserve - self.used - len(self.append)

    def steps(self, example: Example) -> Steps:
        agent, texts = self.agent, self.texts
        question = texts.observations.defuse(example.question)
        self.append = texts.chat.prompt(f"{texts.before}{question}{texts.after}")
        if self.room < 1:
            raise ValueError(
                f"the prompt of {example.id} has {len(self.append)} tokens and the last answer keeps {texts.reserve}: "
                f"max_tokens {agent.max_tokens} leaves no room for a turn"
            )
        while self.limit is None:
            if self.turns >= agent.max_turns:
                self.limit = "max_turns"
            elif self.room < 1:
                self.limit = "max_tokens"
            else:
                action = self._action((yield self._turn()))
                if action.name == "answer":
                    return self._outcome(action.content)
                if action.name == "search" and self._may_search():
                    found = yield Search((action.content,), agent.k)
                    self._show(found)
                elif action.name is None and self.limit is None:
                    self._reject()
                    if agent.on_invalid == "end":
                        return self._outcome(None)
        if agent.on_limit == "force_answer" or self.limit == "invalid":
            return self._outcome(self._forced((yield self._force())))
        if agent.on_limit == "free_answer":
            action = self._action((yield self._last_turn()))
            return self._outcome(action.content if action.name == "answer" else None)
        return self._outcome(None)

    def _turn(self) -> Generate:
        limit = min(self.agent.max_tokens_per_turn, self.room)
        return self._generate(self.agent.tags.stop, limit)

    def _generate(self, stop: tuple[str, ...], limit: int) -> Generate:
        append, self.append = self.append, []
        self.used += len(append)
        self.allowance = limit
        return Generate(self.agent.stream, self.agent.role, append, stop, limit)

    def _read(self, reply: Reply, inside: str | None = None) -> Action:
        """Label the reply's tokens, note its blocks, return its action."""
        tokens = reply.tokens.tolist()
        pieces = [self.texts.token_bytes[token] for token in tokens]
        reading = self.agent.tags.read(b"".join(pieces), inside=inside)
        reply.span.tags = label_tokens([len(piece) for piece in pieces], reading.regions)
        self.blocks += reading.blocks
        self.used += len(tokens)
        self.turns += 1
        self.ended = reply.stopped_by == "end"
        return reading.action

    def _action(self, reply: Reply) -> Action:
        action = self._read(reply)
        if action.name == "search" and not action.content:
            action = Action(None, "")  # nothing to search for
        cut = reply.stopped_by == "limit" and len(reply.tokens) >= self.allowance
        if cut and action.name is None and self.limit is None:
            if self.allowance < self.agent.max_tokens_per_turn:
                self.limit = "max_tokens"
            elif self.agent.on_long_turn == "limit":
                self.limit = "max_tokens_per_turn"
        return action

    def _may_search(self) -> bool:
        """Whether the search asked for is done: a limit speaks against it, or nobody would read its result."""
        agent, texts = self.agent, self.texts
        if self.searches >= agent.max_searches:
            self.limit = "max_searches"
        elif agent.on_limit == "truncate" and self.turns >= agent.max_turns:
            self.limit = "max_turns"
        elif self.room < texts.chat.frame + texts.observations.least + (agent.on_limit == "truncate"):
            self.limit = "max_tokens"
        return self.limit is None

    def _show(self, found: Found) -> None:
        texts = self.texts
        self.searches += 1
        limit = min(self.agent.max_observation_tokens, self.room - texts.chat.frame)
        passages = found.passages[0] if found.passages else []
        ids = texts.observations.render(passages, limit, failed=found.error is not None)
        self.append = texts.chat.observation(ids, self.ended)
        self.blocks.append(("information", ENVIRONMENT))

    def _reject(self) -> None:
        self.invalid_turns += 1
        if self.agent.on_invalid == "force_answer":
            self.limit = "invalid"
        elif self.agent.on_invalid == "correct":
            correction = self.texts.chat.observation(self.texts.correction, self.ended)
            if len(correction) > self.room:
                self.limit = "max_tokens"
                return
            self.append = correction
            self.blocks.append(("correction", ENVIRONMENT))

    def _force(self) -> Generate:
        if not self.append and self.ended and self.texts.chat.frame:  # the model closed its turn: open another
            self.append = self.texts.chat.observation(self.texts.last_call, True)
            self.blocks.append(("correction", ENVIRONMENT))
        self.append = [*self.append, *self.texts.force]
        self.blocks.append(("force", ENVIRONMENT))
        return self._generate((self.agent.tags.answer.close,), self.agent.max_answer_tokens)

    def _forced(self, reply: Reply) -> str | None:
        action = self._read(reply, inside="answer")
        return action.content if action.name == "answer" else None

    def _last_turn(self) -> Generate:
        if not self.append:  # nothing follows the model's text yet: say why no passages do
            self.append = self.texts.chat.observation(self.texts.last_call, self.ended)
            self.blocks.append(("correction", ENVIRONMENT))
        room = self.agent.max_tokens - self.used - len(self.append)
        return self._generate(self.agent.tags.stop, min(self.agent.max_tokens_per_turn, room))

    def _outcome(self, answer: str | None) -> Outcome:
        fields: dict[str, Any] = {
            "turns": self.turns,
            "searches": self.searches,
            "invalid_turns": self.invalid_turns,
            "limit": self.limit,
            "blocks": self.blocks,
        }
        if answer is None and self.limit is not None:
            fields["status"] = TRUNCATED
        return Outcome(answer, fields)


# How published systems count turns. The same number N means different things:
#   Search-R1            N turns that may search, then one last generation whose search is not done: N searches.
#   SkyRL, verl, slime   N generations in all; a search asked for in the last one is read by nobody: N - 1 searches.


def search_r1(tokenizer: Tokenizer, *, searches: int = 4, **changes: Any) -> SearchAgent:
    """Search-R1's rules: `searches` turns and one free last generation; a turn cut short is an invalid action."""
    rules: dict[str, Any] = {
        "max_turns": searches,
        "max_searches": searches,
        "on_limit": "free_answer",
        "on_invalid": "correct",
        "on_long_turn": "invalid",
        "max_answer_tokens": 500,
    }
    return SearchAgent(tokenizer, **(rules | changes))


def skyrl(tokenizer: Tokenizer, *, generations: int = 4, **changes: Any) -> SearchAgent:
    """SkyRL's rules (verl's and slime's count as well): `generations` in all, so one search fewer is read."""
    rules: dict[str, Any] = {
        "max_turns": generations,
        "max_searches": generations,  # the turns end it first
        "on_limit": "truncate",
        "on_invalid": "correct",
        "on_long_turn": "invalid",
        "observation": "\n{information.open}{passages}{information.close}\n",
        "passage": "Doc {i}: {title}\n{text}\n",
    }
    return SearchAgent(tokenizer, **(rules | changes))
