import pytest
from transformers import PreTrainedTokenizerFast

from rlrag.agents.chat import Plain, chat_template, transformers_render
from rlrag.agents.tokenizer import Tokenizer, train_bpe

ROLES = ("<|start|>", "<|stop|>")


class Fast(PreTrainedTokenizerFast):
    """A transformers tokenizer whose template is Python, so that the tests need no template engine.

    The template has the habits that break others: a default system message, a newline after the end token, a
    generation prompt that history does not show, thinking dropped from history.
    """

    def apply_chat_template(self, conversation, tokenize=True, add_generation_prompt=False, **_):
        assert not tokenize
        if self.chat_template == "twice":
            return conversation[-1]["content"] * 2
        if self.chat_template == "no end":
            return "".join(f"[{message['content']}]" for message in conversation)
        default = [] if conversation[0]["role"] == "system" else [{"role": "system", "content": "Be brief."}]
        text = ""
        for message in [*default, *conversation]:
            content = message["content"]
            shown = content.split("</think>")[-1] if message["role"] == "assistant" else content
            text += f"<|start|>{message['role']}\n{shown}<|stop|>\n"
        return text + "<|start|>assistant\n<think>\n" * add_generation_prompt


def build(template: str | None = "usual") -> tuple[Fast, Tokenizer]:
    trained = train_bpe(["system user assistant tool question\n"] * 3, 300, special=ROLES, end="<|stop|>")
    fast = Fast(tokenizer_object=trained.backend, eos_token="<|stop|>", chat_template=template, pad_token="<|pad|>")
    return fast, Tokenizer.from_transformers(fast)


def test_plain_adds_nothing():
    _, tokenizer = build()
    chat = Plain(tokenizer)
    assert chat.prompt("question") == tokenizer.encode("question")
    assert chat.observation([5, 6], ended=True) == [5, 6]
    assert chat.frame == 0


def test_prompt_equals_the_template():
    fast, tokenizer = build()
    chat = chat_template(tokenizer, transformers_render(fast))
    rendered = fast.apply_chat_template(
        [{"role": "user", "content": "who?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.prompt("who?") == tokenizer.encode(rendered)
    with_system = chat_template(tokenizer, transformers_render(fast), system="Search.")
    assert tokenizer.decode(with_system.prompt("x")).startswith("<|start|>system\nSearch.<|stop|>\n<|start|>user\nx")


@pytest.mark.parametrize("ended", [False, True])
def test_growing_stream_keeps_every_prefix_and_the_newline(ended):
    fast, tokenizer = build()
    chat = chat_template(tokenizer, transformers_render(fast), inline=False)
    prompt = chat.prompt("who?")
    reply = tokenizer.encode("<search>Ada</search>") + [tokenizer.end_id] * ended
    stream = [*prompt, *reply, *chat.observation(tokenizer.encode("Doc 1"), ended)]
    assert stream[: len(prompt) + len(reply)] == [*prompt, *reply]
    # what a fresh rendering gives, except that history keeps what the model really wrote after the generation prompt
    text = tokenizer.decode(stream)
    assert text == (
        "<|start|>system\nBe brief.<|stop|>\n<|start|>user\nwho?<|stop|>\n<|start|>assistant\n<think>\n"
        "<search>Ada</search><|stop|>\n<|start|>user\nDoc 1<|stop|>\n<|start|>assistant\n<think>\n"
    )
    assert stream.count(tokenizer.end_id) == 4
    assert chat.frame == len(chat.observation([], ended=False))


def test_inline_observations_continue_the_turn_unless_the_model_ended_it():
    fast, tokenizer = build()
    chat = chat_template(tokenizer, transformers_render(fast), inline=True)
    assert chat.observation([5, 6], ended=False) == [5, 6]
    own = chat_template(tokenizer, transformers_render(fast), inline=False)
    assert chat.observation([5, 6], ended=True) == own.observation([5, 6], ended=True)


def test_observation_role():
    fast, tokenizer = build()
    chat = chat_template(tokenizer, transformers_render(fast), inline=False, observation_role="tool")
    assert "<|start|>tool\n" in tokenizer.decode(chat.observation([], ended=True))


def test_errors():
    fast, tokenizer = build("twice")
    with pytest.raises(ValueError, match="shows a message 2 times"):
        chat_template(tokenizer, transformers_render(fast))
    fast, tokenizer = build("no end")
    with pytest.raises(ValueError, match=r"does not hold the end token '<\|stop\|>'"):
        chat_template(tokenizer, transformers_render(fast), inline=False)
    with pytest.raises(ValueError, match="has no chat template"):
        transformers_render(build(None)[0])
