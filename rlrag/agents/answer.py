"""The agent that answers at once: a prompt, one generation, an outcome. No search, no tags."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from rlrag.agents.chat import Chat, Plain
from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Generate, Mode, Reply
from rlrag.trajectory import TRUNCATED, Example, Outcome

INSTRUCTION = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class AnswerAgent:
    """A workflow. The outcome's answer is the whole text written, without the end token; a generation cut at its limit
    is an answer too, with the status `truncated`.

    max_tokens: of the stream, prompt and answer together. max_tokens_per_turn: of the answer.
    """

    tokenizer: Tokenizer
    chat: Chat | None = None  # None: no template
    max_tokens: int = 512
    max_tokens_per_turn: int = 256
    instruction: str = INSTRUCTION
    stream: str = "agent"
    role: str = "agent"

    def __post_init__(self):
        if "{question}" not in self.instruction:
            raise ValueError(f"agent.instruction is {self.instruction!r}: it must hold {{question}}")
        for name in ("max_tokens", "max_tokens_per_turn"):
            if getattr(self, name) < 1:
                raise ValueError(f"agent.{name} is {getattr(self, name)}: give 1 or more")

    def __call__(self, example: Example, mode: Mode) -> Generator[Generate, Reply, Outcome]:
        before, after = self.instruction.split("{question}", 1)
        prompt = (self.chat or Plain(self.tokenizer)).prompt(f"{before}{example.question}{after}")
        limit = min(self.max_tokens_per_turn, self.max_tokens - len(prompt))
        if limit < 1:
            raise ValueError(f"the prompt of {example.id} has {len(prompt)} of max_tokens {self.max_tokens}")
        reply = yield Generate(self.stream, self.role, prompt, stop=(), limit=limit)
        cut = len(reply.tokens) == limit and reply.tokens[-1] != self.tokenizer.end_id
        fields: dict[str, Any] = {"turns": 1, "invalid_turns": 0}
        if cut:
            fields |= {"limit": "max_tokens_per_turn", "status": TRUNCATED}
        return Outcome(self.text(reply), fields)

    def text(self, reply: Reply) -> str:
        ids = [id for id in reply.tokens.tolist() if id != self.tokenizer.end_id]
        return self.tokenizer.decode(ids).strip()
