"""BM25 over a corpus of passages, with the bm25s library: lexical retrieval in the process that asks.

The baseline is fixed so that recall can be compared between systems: Lucene's BM25 (k1 = 1.2, b = 0.75) over
title + " " + text, tokens = lower-cased `\\b\\w+\\b`, no stop words, no stemming.

Tables are numpy arrays and JSON, saved and mapped without pickle. JAX is deliberately absent: a search server starts
in a second and never takes memory on an accelerator.
"""

import importlib
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.retrieval.corpus import StoredPassages, read_corpus
from rlrag.retrieval.index import check_request
from rlrag.trajectory import Passage

_WORD = re.compile(r"(?u)\b\w+\b")  # of lower-cased text
_IMPORTING = threading.Lock()
CHUNK = 8192  # passages whose words are kept in one file while an index is built


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
        self._bm25 = _import_bm25s().BM25(method="lucene", k1=k1, b=b, backend="numpy")
        self._bm25.index(_words(passages), show_progress=False)

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
        check_request(queries, k, scopes, scoped=False)
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Passage]:
        ids = self._bm25.get_tokens_ids(_WORD.findall(query.lower()))
        if not ids:
            return []
        scores = self._bm25.get_scores_from_ids(ids)  # float32 [passages]
        best = _top(scores, k)
        return [_scored(self._passages[row], score) for row, score in zip(best.tolist(), scores[best].tolist())]

    @classmethod
    def load(cls, directory: str | Path) -> "Bm25Index":
        """The index that `build` left in a directory. Tables and passages stay on disk and are paged in as they are
        used, once for all the processes that read them."""
        directory = Path(directory)
        if not (directory / "params.index.json").is_file():
            raise ValueError(f"{directory} holds no BM25 tables (params.index.json is missing): build the index again")
        index = cls.__new__(cls)
        index._bm25 = _import_bm25s().BM25.load(directory, mmap=True, show_progress=False)
        index._passages = StoredPassages(directory)
        return index

    @classmethod
    def build(cls, directory: Path, *, k1: float = 1.2, b: float = 0.75) -> Iterator[int]:
        """Index the passages stored in a directory, beside them; yields how many were read, now and then. Words of
        `CHUNK` passages at a time are kept in a file, so that a build that was killed goes on where it stood. Consume
        it to its end."""
        passages = StoredPassages(directory)
        index = cls.__new__(cls)
        index._bm25 = _import_bm25s().BM25(method="lucene", k1=k1, b=b, backend="numpy")
        files = []
        for start in range(0, len(passages), CHUNK):
            files.append(directory / f"words-{start:012d}.npz")
            rows = range(start, min(start + CHUNK, len(passages)))
            if not files[-1].exists():
                _keep_words([passages[row] for row in rows], files[-1])
            yield rows.stop
        index._bm25.index(_KeptWords(files), show_progress=False)
        index._bm25.save(directory, show_progress=False)
        for file in files:
            file.unlink()


@dataclass
class _KeptWords(Sequence[list[int]]):
    """The word ids of every passage, chunk by chunk from files: what bm25s reads, without holding it."""

    files: list[Path]

    def __post_init__(self):
        self.vocab: dict[str, int] = {}
        self.chunks: list[tuple[np.ndarray, np.ndarray]] = []  # ids of all passages one after the other; their ends
        for file in self.files:
            with np.load(file, allow_pickle=False) as kept:
                words = json.loads(kept["words"].tobytes())
                ids = np.array([self.vocab.setdefault(word, len(self.vocab)) for word in words], np.int32)
                self.chunks.append((ids[kept["ids"]], np.cumsum(kept["lengths"])))

    @property
    def ids(self) -> "_KeptWords":
        return self

    def __len__(self) -> int:
        return sum(len(ends) for _, ends in self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        for ids, ends in self.chunks:
            for begin, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
                yield ids[begin:end].tolist()

    def __getitem__(self, row: Any) -> Any:
        chunk, within = divmod(row, CHUNK)
        ids, ends = self.chunks[chunk]
        return ids[ends[within - 1] if within else 0 : ends[within]].tolist()


def _keep_words(passages: Sequence[Passage], file: Path) -> None:
    words = _words(passages)
    by_id = sorted(words.vocab, key=words.vocab.__getitem__)
    part = file.with_suffix(".part")
    with open(part, "wb") as out:
        np.savez(
            out,
            words=np.frombuffer(json.dumps(by_id).encode(), np.uint8),
            ids=np.array([id for ids in words.ids for id in ids], np.int32),
            lengths=np.array([len(ids) for ids in words.ids], np.int32),
        )
    part.replace(file)


def _words(passages: Sequence[Passage]) -> Any:
    """bm25s's own tokens: `ids` of each passage, and the vocabulary they are numbers in."""
    texts = [f"{passage.title} {passage.text}" for passage in passages]
    return _import_bm25s().tokenize(
        texts, token_pattern=_WORD.pattern, stopwords=None, stemmer=None, show_progress=False
    )


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
