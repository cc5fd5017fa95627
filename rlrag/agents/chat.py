"""Prompts and observations as token ids: without a template, or with a chat template taken apart once.

A growing episode must never be rendered again: templates drop thinking from history, trim, and lose the newline after
the end token, and then the policy is trained on a context it never saw. So the template is rendered once with
sentinels where the contents go, cut there, and its pieces become ids. Everything after a prompt is concatenation, and
every prompt is an exact prefix of what follows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlrag.agents.tokenizer import Tokenizer

Render = Callable[[Sequence[dict[str, str]], bool], str]  # messages, add_generation_prompt -> text


class Chat(Protocol):
    """How a question starts a stream and how an observation continues it."""

    def prompt(self, text: str) -> list[int]:
        """The first tokens of a stream, up to where the model writes."""
        ...

    def observation(self, ids: Sequence[int], ended: bool) -> list[int]:
        """An observation in its frame, up to where the model writes. ended: the reply before it sampled the end."""
        ...

    @property
    def frame(self) -> int:
        """The most tokens `observation` adds to its ids."""
        ...


@dataclass(frozen=True)
class Plain:
    """No template: the prompt is the text, observations follow the model's text directly."""

    tokenizer: Tokenizer

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def observation(self, ids: Sequence[int], ended: bool) -> list[int]:
        return list(ids)

    @property
    def frame(self) -> int:
        return 0


@dataclass(frozen=True)
class Template:
    """A chat template: prompts as it renders them, and as ids what stands around a later message, `close` ... `reopen`.

    An observation is ids already, cut to its room. Its ids are those of a rendering where what stands before it ends in
    a newline or a special token (ChatML, Llama 3, Gemma); a template that puts a space there (Mistral) would merge it
    with the first word, and here it stays a token of its own.

    inline: observations continue the assistant's own turn, as Search-R1 does, as long as the model has not ended it;
    otherwise each is a message of its own.
    """

    tokenizer: Tokenizer
    render: Callable[[str], str]  # a question -> the text up to where the model writes
    close: tuple[int, ...]  # from the model's last token to an observation's message, its turn end included
    close_ended: tuple[int, ...]  # the same where the model sampled the end token itself
    reopen: tuple[int, ...]  # from an observation's message to where the model writes
    inline: bool

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.render(text))

    def observation(self, ids: Sequence[int], ended: bool) -> list[int]:
        if self.inline and not ended:
            return list(ids)
        return [*(self.close_ended if ended else self.close), *ids, *self.reopen]

    @property
    def frame(self) -> int:
        return len(self.close) + len(self.reopen)


_QUESTION, _REPLY, _OBSERVATION = "QUESTIONSENTINEL", "REPLYSENTINEL", "OBSERVATIONSENTINEL"


def chat_template(
    tokenizer: Tokenizer,
    render: Render,
    *,
    system: str | None = None,
    observation_role: str = "user",
    inline: bool = True,
) -> Template:
    """Take a template apart. `render` is a transformers tokenizer's own rendering (see `transformers_render`).

    observation_role: whose message an observation is where not inline ("user", or "tool" where the template knows it).
    """
    first = [] if system is None else [{"role": "system", "content": system}]

    def prompt(text: str) -> str:
        return render([*first, {"role": "user", "content": text}], True)

    _cut(prompt(_QUESTION), _QUESTION)
    question = [*first, {"role": "user", "content": _QUESTION}]
    reply = {"role": "assistant", "content": _REPLY}
    observation = {"role": observation_role, "content": _OBSERVATION}
    close, reopen = _cut(_cut(render([*question, reply, observation], True), _REPLY)[1], _OBSERVATION)
    if tokenizer.end not in close:
        raise ValueError(
            f"the template ends the assistant's turn with {close!r}, which does not hold the end token "
            f"{tokenizer.end!r}: give the tokenizer the end token that the template uses"
        )
    close_ended = close.split(tokenizer.end, 1)[1]  # keeps the newline that follows the end token
    pieces = [tuple(tokenizer.encode(piece)) for piece in (close, close_ended, reopen)]
    return Template(tokenizer, prompt, *pieces, inline=inline)


def transformers_render(fast: Any) -> Render:
    """The rendering of a transformers tokenizer that has a chat template."""
    if not getattr(fast, "chat_template", None):
        raise ValueError(f"{type(fast).__name__} has no chat template: use Plain, or give one")
    return lambda messages, generate: fast.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=generate
    )


def _cut(text: str, sentinel: str) -> tuple[str, str]:
    if text.count(sentinel) != 1:
        raise ValueError(f"the chat template shows a message {text.count(sentinel)} times, once is needed: {text!r}")
    before, after = text.split(sentinel)
    return before, after
