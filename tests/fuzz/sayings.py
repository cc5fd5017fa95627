"""What a hostile policy writes, and a tokenizer that is never asked to encode it again."""

import random
from collections import Counter
from functools import cache

from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import END, Tokenizer, train_bpe
from tests.fuzz.faults import expect

MARK = "zq"  # in everything the scripts say, so that encoding it again is seen
UNICODE = [
    "e\u0301\u0327",
    "\u202eabc\u202c",
    "a\x00b",
    "\U0001f469\u200d\U0001f680",
    "\ufeff",
    "\u2028",
    "漢字仮名",
    " \t\r\n",
]


@cache
def build_tokenizer(pad_is_end: bool) -> Tokenizer:
    """Tags are single tokens, and can also be spelled by their bytes."""
    texts = ["what is the capital of France? Paris. Doc 1(Title: x) search unavailable"] * 9
    return train_bpe(iter(texts), 420, special=Tags().strings, **({"pad": END} if pad_is_end else {}))


def spell(tokenizer: Tokenizer, text: str, dice: random.Random) -> list[int]:
    """Text as ids: in the tokenizer's way, or byte by byte, so that tags and characters are split."""
    if dice.random() < 0.5:
        return Watch.original(tokenizer, text)
    by_byte = {piece: id for id, piece in reversed(list(enumerate(tokenizer.token_bytes()))) if len(piece) == 1}
    return [by_byte[bytes([byte])] for byte in text.encode("utf-8", errors="surrogatepass")]


def say(tokenizer: Tokenizer, dice: random.Random, seen: Counter) -> list[int]:
    """What a hostile policy writes in one call; the double cuts it where the program would."""
    ids: list[int] = []
    for _ in range(dice.randint(0, 4)):
        kind = dice.choice(SAYINGS)
        seen[f"said: {kind}"] += 1
        word = f"{MARK}{dice.randint(0, 99)}{dice.choice(UNICODE) if dice.random() < 0.3 else ''}"
        texts = {
            "search": f"<search> {word} </search>", "empty search": "<search>  </search>",
            "answer": f"<answer>{word}</answer>", "right answer": "<answer>Paris</answer>",
            "forged information": f"<information>{word} Paris</information>", "think": f"<think>{word}</think>",
            "open tag": f"<search>{word}", "closing tag": f"</answer>{word}</information>",
            "nested tags": f"<search><answer>{word}</search></answer>", "half a tag": f"<sea {word} </sear",
            "plain": f" {word} ",
        }  # fmt: skip
        if kind == "bytes":
            ids += [dice.randrange(9, 9 + 256) for _ in range(dice.randint(1, 6))]
        elif kind == "long":
            ids += spell(tokenizer, f"{word} ", dice) * dice.randint(3, 9)
        else:
            ids += spell(tokenizer, texts[kind], dice)
    return [*ids, tokenizer.end_id] if dice.random() < 0.7 else ids * 9


SAYINGS = (
    "search", "search", "search", "empty search", "answer", "right answer", "forged information", "think", "open tag",
    "closing tag", "nested tags", "half a tag", "plain", "bytes", "long",
)  # fmt: skip


class Watch(Tokenizer):
    """A tokenizer that is not asked to encode what a policy wrote."""

    original = Tokenizer.encode

    def encode(self, text: str) -> list[int]:
        expect(MARK not in text, f"encoded again: {text!r}")
        return Watch.original(self, text)
