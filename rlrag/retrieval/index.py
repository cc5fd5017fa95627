"""BM25 over a corpus of passages, with the bm25s library: lexical retrieval in the process that asks.

The baseline is fixed so that recall can be compared between systems: Lucene's BM25 (k1 = 1.2, b = 0.75) over
title + " " + text, tokens = lower-cased `\\b\\w+\\b`, no stop words, no stemming.

Tables are numpy arrays and JSON, saved and mapped without pickle. JAX is deliberately absent: a search server starts
in a second and never takes memory on an accelerator.
"""

import gzip
import importlib
import json
import logging
import mmap
import re
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.trajectory import Passage

_WORD = re.compile(r"(?u)\b\w+\b")  # of lower-cased text
_IMPORTING = threading.Lock()
_PASSAGES, _OFFSETS = "passages.jsonl", "passages.offsets.npy"


class Bm25Index:
    """Passages that share words with a query, best first. Safe to search from many threads at once.

    k1: how fast repeated words stop counting; b: how much long passages are held back (0 not at all, 1 fully).
    """

    def __init__(self, passages: Sequence[Passage], *, k1: float = 1.2, b: float = 0.75):
        if not len(passages):
            raise ValueError("the corpus holds no passages: give at least one")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"BM25 k1 is {k1} and b is {b}: give k1 >= 0 and 0 <= b <= 1")
        self._passages: Sequence[Passage] = passages
        bm25s = _import_bm25s()
        self._bm25 = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        texts = [f"{passage.title} {passage.text}" for passage in passages]
        words = bm25s.tokenize(texts, token_pattern=_WORD.pattern, stopwords=None, stemmer=None, show_progress=False)
        self._bm25.index(words, show_progress=False)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, k1: float = 1.2, b: float = 0.75) -> "Bm25Index":
        """Index a JSONL corpus (see `read_corpus`). Holds the passages in memory."""
        return cls(list(read_corpus(path)), k1=k1, b=b)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """The k best passages for each query, with their scores; fewer where fewer share a word with the query.

        A query with no known word gets an empty list: a passage that shares nothing with it was not found, however
        large k is. Equal scores keep corpus order, so results are the same on every machine.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries is the string {queries!r}: give a sequence of strings")
        if k < 1:
            raise ValueError(f"k is {k}: ask for at least 1 passage")
        if scopes is not None and len(scopes) != len(queries):
            raise ValueError(
                f"{len(scopes)} scopes for {len(queries)} queries: give one scope (or None) for each query"
            )
        scope = next((scope for scope in scopes or () if scope is not None), None)
        if scope is not None:
            raise ValueError(f"this BM25 index has one corpus and no scope {scope!r}: use scope None or a scoped index")
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Passage]:
        ids = self._bm25.get_tokens_ids(_WORD.findall(query.lower()))
        if not ids:
            return []
        scores = self._bm25.get_scores_from_ids(ids)  # float32 [passages]
        best = _top(scores, k)
        return [_scored(self._passages[row], score) for row, score in zip(best.tolist(), scores[best].tolist())]

    def save(self, directory: str | Path) -> None:
        """Write the index with its passages into a new directory."""
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty: save the index in a new directory, or remove that one first")
        directory.mkdir(parents=True, exist_ok=True)
        offsets = np.zeros(len(self._passages) + 1, np.int64)
        with open(directory / _PASSAGES, "wb") as file:
            for row, passage in enumerate(self._passages):
                fields = {"id": passage.id, "title": passage.title, "text": passage.text}
                file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
                offsets[row + 1] = file.tell()
        np.save(directory / _OFFSETS, offsets, allow_pickle=False)
        self._bm25.save(directory, show_progress=False)

    @classmethod
    def load(cls, directory: str | Path, *, mmap: bool = False) -> "Bm25Index":
        """Read a saved index. mmap: tables and passages stay on disk and are paged in as they are used."""
        directory = Path(directory)
        missing = [n for n in ("params.index.json", _PASSAGES, _OFFSETS) if not (directory / n).is_file()]
        if missing:
            raise ValueError(f"{directory} holds no saved BM25 index ({missing[0]} is missing): write it with save()")
        index = cls.__new__(cls)
        index._bm25 = _import_bm25s().BM25.load(directory, mmap=mmap, show_progress=False)
        index._passages = _MappedPassages(directory) if mmap else list(read_corpus(directory / _PASSAGES))
        return index


class _MappedPassages(Sequence[Passage]):
    """Passages of a saved index, each read from the mapped file when asked for; reads share no state."""

    def __init__(self, directory: Path):
        self._offsets = np.load(directory / _OFFSETS, mmap_mode="r", allow_pickle=False)  # int64 [passages + 1]
        with open(directory / _PASSAGES, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return Passage(**json.loads(self._bytes[self._offsets[row] : self._offsets[row + 1]]))


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a JSONL corpus, gzipped or not, one row a line in either published layout:

    `{"id", "title", "text"}`, or Search-R1's `{"id", "contents"}`, whose first line is the title in double quotes
    (taken off here: quotes are a matter of rendering) and whose rest is the text; contents of one unquoted line are
    all text. A row with both follows title and text. Other fields are passed over.

    Raises ValueError with file, line, fault and remedy for a row that is neither, and for an id that comes twice.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            passage = _parse_row(json.loads(line))
            if passage.id in seen:
                raise ValueError(f"id {passage.id!r} is also on line {seen[passage.id]}; give each passage its own")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); give one object a line") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        seen[passage.id] = number
        yield passage


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1, unpacked where the file is gzipped, whatever its name."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: damaged gzip data ({error}); fetch the file again") from None


def _parse_row(row: Any) -> Passage:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; give an object with id and contents, or id, title and text")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id"), str | int):
        raise ValueError(f"field 'id' is {row.get('id')!r}; give a string or an integer")
    fields = ("title", "text") if "text" in row else ("contents",)
    for field in fields:
        if not isinstance(row.get(field), str):
            wanted = "contents, or title and text" if field not in row else "a string"
            raise ValueError(f"field {field!r} is {str(row.get(field))[:40]!r}; give {wanted}")
    if "text" in row:
        return Passage(str(row["id"]), row["title"], row["text"])
    first, _, rest = row["contents"].partition("\n")
    quoted = len(first) >= 2 and first[0] == first[-1] == '"'
    if not rest and not quoted:
        return Passage(str(row["id"]), "", first)
    return Passage(str(row["id"]), first[1:-1] if quoted else first, rest)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores above 0, best first, equal scores by row.

    bm25s's own choice among equal scores is lax.top_k's (by row) where JAX is installed, and left to numpy's
    partition, hence to k and the processor, where it is not.
    """
    if k < len(scores):
        bar = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero((scores >= bar) & (scores > 0))
    else:
        rows = np.flatnonzero(scores > 0)
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def _scored(passage: Passage, score: float) -> Passage:
    return Passage(passage.id, passage.title, passage.text, score)


def _import_bm25s() -> Any:
    """Import bm25s late (0.6 s), without JAX, and quietly (it logs its own steps at debug level).

    Where bm25s sees JAX it runs a JAX program at import time, for a top-k that is not used here. That would cost a
    search server a second and most of an accelerator's memory, and a training process its chance to call
    `jax.distributed.initialize`, which must come before any JAX program.
    """
    with _IMPORTING:
        if "bm25s" not in sys.modules:
            lax = sys.modules.pop("jax.lax", None)
            sys.modules["jax.lax"] = None  # type: ignore[assignment]  # makes `import jax.lax` raise ImportError
            try:
                importlib.import_module("bm25s")
            finally:
                del sys.modules["jax.lax"]
                if lax is not None:
                    sys.modules["jax.lax"] = lax
            logging.getLogger("bm25s").setLevel(logging.WARNING)
        return sys.modules["bm25s"]
