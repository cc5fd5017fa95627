"""Text to token ids and back, exactly, with the bytes of every token.

Three kinds of vocabulary are read: byte-level BPE (GPT-2, Qwen, Llama 3), SentencePiece-like (Llama 2, Gemma) and
word-level (the embedded worlds). Decoding joins the bytes of the tokens, so it agrees by construction with the stop
automata and the region labels, which run over the same bytes. Nothing is added (no begin token) and nothing is
cleaned up.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END, PAD = "<|end|>", "<|pad|>"
_MARKER = "▁"  # SentencePiece writes a space as this character


class Tokenizer:
    """A `tokenizers.Tokenizer` with its end and padding tokens.

    `end` is the token whose sampling ends a turn; `pad` fills rows and may be the same token (None: it is).
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, end: str, pad: str | None = None):
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.end, self.pad = end, end if pad is None else pad
        self.end_id, self.pad_id = self._id("end", self.end), self._id("pad", self.pad)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self._kind, self._strips = _kind(backend)
        self._bytes = _token_bytes(backend, self._kind, self.vocab_size)
        # Worlds encode thousands of short texts a second: a dictionary is 10x faster than the backend's call.
        added = backend.get_added_tokens_decoder()
        self._words = vocabulary if self._kind == "word" and not added else None
        # Strings that would become control tokens if a document or a question contained them.
        self.special = tuple(sorted(token.content for token in added.values() if token.special))

    @classmethod
    def load(cls, path: str | Path, *, end: str | None = None, pad: str | None = None) -> "Tokenizer":
        """Read tokenizer.json (the file, or a folder holding it).

        `end` and `pad` default to eos_token and pad_token of a tokenizer_config.json beside it.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at {file}: give a tokenizer.json or the folder holding one")
        config_file = file.parent / "tokenizer_config.json"
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        end = end or _content(config.get("eos_token"))
        if end is None:
            raise ValueError(f"{config_file} names no eos_token: give end= (the token that ends a turn) for {file}")
        return cls(tokenizers.Tokenizer.from_file(str(file)), end=end, pad=pad or _content(config.get("pad_token")))

    @classmethod
    def from_transformers(cls, fast: Any, *, end: str | None = None, pad: str | None = None) -> "Tokenizer":
        """Wrap a transformers fast tokenizer; the backend is copied, so settings of the original stay as they are."""
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(fast).__name__} has no backend_tokenizer: give a transformers *fast* tokenizer")
        end = end or fast.eos_token
        if end is None:
            raise ValueError(f"{type(fast).__name__} has no eos_token: give end= (the token that ends a turn)")
        return cls(tokenizers.Tokenizer.from_str(backend.to_str()), end=end, pad=pad or fast.pad_token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none is added."""
        if self._words is None:
            return self.backend.encode(text, add_special_tokens=False).ids
        try:
            return [self._words[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(f"the word {error.args[0]!r} is not in the word-level vocabulary") from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        text = self.join(ids).decode("utf-8", errors="replace")
        return text[1:] if self._strips and text.startswith(" ") else text

    def join(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids, one after the other."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join([self._bytes[i] for i in ids])

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id of the vocabulary; b"" for ids that no token has."""
        return self._bytes

    def pad_to(self, size: int) -> None:
        """Know the ids a model's padded vocabulary adds behind the tokenizer's: they have no bytes."""
        self._bytes += [b""] * (size - len(self._bytes))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by `load` and by transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end, "pad_token": self.pad}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _id(self, name: str, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the {name} token {token!r} is not in the vocabulary")
        return found


def word_tokenizer(words: Iterable[str], *, end: str = END, pad: str = PAD) -> Tokenizer:
    """A closed word-level vocabulary: pad, end, then the words in their order. Text is split at white space."""
    vocabulary: dict[str, int] = {}
    for word in (pad, end, *words):
        if word in vocabulary and word not in (pad, end):
            raise ValueError(f"the word {word!r} appears twice in the vocabulary")
        if word != "".join(word.split()) or not word:
            raise ValueError(f"{word!r} is no word: a word-level vocabulary holds words without white space")
        vocabulary.setdefault(word, len(vocabulary))
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, end=end, pad=pad)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = (), end: str = END, pad: str = PAD
) -> Tokenizer:
    """Train a byte-level BPE on texts; `special` strings (tags) become one added token each, never split or merged.

    Ids: pad, end, special, the 256 bytes, merges. Every text is encodable. The result depends on the texts only.
    """
    specials = list(dict.fromkeys((pad, end, *special)))
    least = len(specials) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}: {len(specials)} special tokens and 256 bytes need {least}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, end=end, pad=pad)


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _kind(backend: tokenizers.Tokenizer) -> tuple[str, bool]:
    """("byte" | "marker" | "word", whether decoding drops one leading space)."""
    description = json.loads(backend.to_str())
    model, decoder = description["model"]["type"], json.dumps(description.get("decoder"), ensure_ascii=False)
    if model == "WordLevel":
        return "word", True
    if '"ByteLevel"' in decoder:
        return "byte", False
    if _MARKER in decoder:  # Metaspace, or Replace with or without ByteFallback and Strip
        return "marker", '"Strip"' in decoder or '"first"' in decoder or '"always"' in decoder
    raise ValueError(
        f"the bytes of this {model} tokenizer's tokens are not known: its decoder is {decoder}; "
        "byte-level, SentencePiece-like and word-level vocabularies are supported"
    )


def _token_bytes(backend: tokenizers.Tokenizer, kind: str, size: int) -> list[bytes]:
    table = [b""] * size
    decode = {"byte": _byte_level, "marker": _sentencepiece, "word": lambda token: f" {token}".encode()}[kind]
    for token, i in backend.get_vocab(with_added_tokens=False).items():
        table[i] = decode(token)
    for i, token in backend.get_added_tokens_decoder().items():
        table[i] = token.content.encode()
    return table


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes: printable bytes are themselves, the others follow 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _gpt2_bytes()


def _byte_level(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()  # a special token kept in the base vocabulary


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_MARKER, " ").encode()
