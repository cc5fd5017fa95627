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


# In the style of the families: how a turn begins and ends, what stands before the first, what system messages become.
STYLES = {
    "qwen2.5": (
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    # Thinking is dropped from history, and forestalled on demand.
    "qwen3": (
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>",
        "{% for m in messages %}{% set said = m.content %}{% if m.role == 'assistant' %}"
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    "llama3": (
        ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>",
        "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    ),
    "mistral": (
        ("<s>", "</s>", "[INST]", "[/INST]"), "</s>",
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    "gemma3": (
        ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>",
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_transformers(style):
    """A whole conversation, with the real template engine."""
    special, end, template = STYLES[style]
    words = ["system user assistant model who wrote it? Ada did.\n"] * 3
    trained = train_bpe(words, 320, special=special, end=end)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained.backend, eos_token=end, chat_template=template)
    tokenizer = Tokenizer.from_transformers(fast)
    chat = chat_template(tokenizer, transformers_render(fast), inline=False)
    messages = [{"role": "user", "content": "Who wrote it?"}]
    told = fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat.prompt("Who wrote it?") == told
    space = " " if style == "mistral" else ""
    stream = [*told, *tokenizer.encode(f"{space}Ada?"), tokenizer.end_id]
    stream += chat.observation(tokenizer.encode("Ada did."), ended=True)
    messages += [{"role": "assistant", "content": "Ada?"}, {"role": "user", "content": "Ada did."}]
    rendered = fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(stream) == tokenizer.decode(rendered)
    if style != "mistral":  # whose template puts a space before an observation: see Template
        assert stream == rendered
    if style in ("qwen2.5", "qwen3", "llama3"):  # the others have no place for a system message
        with_system = chat_template(tokenizer, transformers_render(fast), system="Ada did.")
        messages = [{"role": "system", "content": "Ada did."}, {"role": "user", "content": "Who?"}]
        assert with_system.prompt("Who?") == fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    # Where a template trims what is said, the prompt does too.
    spaced = [{"role": "user", "content": "  Who?\n"}]
    assert chat.prompt("  Who?\n") == fast.apply_chat_template(spaced, add_generation_prompt=True)["input_ids"]
