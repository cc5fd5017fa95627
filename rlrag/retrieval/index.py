"""What every index is: something that finds passages for queries; and what can be made of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rlrag.trajectory import Passage

Rerank = Callable[[str, list[Passage]], Sequence[float]]  # a query and its passages -> a score for each


class Index(Protocol):
    """Anything that finds passages: at most k for each query, best first. scopes: a sub-corpus for each query (None:
    the whole). Safe to call from many threads at once.

    Raises ValueError for a request that can never be answered (an unknown scope, k below 1), and SearchUnavailable
    where the answer failed to come.
    """

    def search(
        self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None
    ) -> list[list[Passage]]: ...


def check_request(queries: Sequence[str], k: int, scopes: Sequence[str | None] | None, *, scoped: bool) -> None:
    """ValueError for a request that cannot be answered. scoped: whether the index has sub-corpora."""
    if isinstance(queries, str):
        raise ValueError(f"queries is the string {queries!r}: give a sequence of strings")
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 passage")
    if scopes is not None and len(scopes) != len(queries):
        raise ValueError(f"{len(scopes)} scopes for {len(queries)} queries: give one scope (or None) for each query")
    scope = next((scope for scope in scopes or () if scope is not None), None)
    if scope is not None and not scoped:
        raise ValueError(f"this index has one corpus and no scope {scope!r}: use scope None or a scoped index")


@dataclass(frozen=True)
class Fused:
    """Several indexes over the same passages as one, by reciprocal rank fusion (Cormack et al. 2009, section 2):

        score(p) = sum over indexes of weight / (constant + rank of p), ranks from 1, nothing where p was not found

    depth: passages asked of each index. Equal scores keep the order of the first index that found them.
    """

    indexes: tuple[Index, ...]
    weights: tuple[float, ...] = ()  # one each; empty: equal
    depth: int = 100
    constant: float = 60.0

    def __post_init__(self):
        if self.weights and len(self.weights) != len(self.indexes):
            raise ValueError(f"{len(self.weights)} weights for {len(self.indexes)} indexes: give one for each")

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        depth = max(k, self.depth)
        found = [index.search(queries, depth, scopes) for index in self.indexes]
        return [self._fuse([passages[row] for passages in found])[:k] for row in range(len(queries))]

    def _fuse(self, rankings: Sequence[list[Passage]]) -> list[Passage]:
        scores: dict[str, float] = {}
        passages: dict[str, Passage] = {}
        for ranking, weight in zip(rankings, self.weights or (1.0,) * len(rankings), strict=True):
            for rank, passage in enumerate(ranking, 1):
                passages.setdefault(passage.id, passage)
                scores[passage.id] = scores.get(passage.id, 0.0) + weight / (self.constant + rank)
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        return [replace(passages[id], score=scores[id]) for id in best]


@dataclass(frozen=True)
class Reranked:
    """An index whose `depth` best passages are ordered anew, by a function's scores; equal ones keep their order."""

    index: Index
    rerank: Rerank
    depth: int = 20

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        found = self.index.search(queries, max(k, self.depth), scopes)
        return [rerank(self.rerank, query, passages)[:k] for query, passages in zip(queries, found, strict=True)]


def rerank(function: Rerank, query: str, passages: list[Passage]) -> list[Passage]:
    """The passages with the function's scores, best first."""
    scores = [float(score) for score in function(query, passages)]
    if len(scores) != len(passages):
        raise ValueError(
            f"the reranking function gave {len(scores)} scores for {len(passages)} passages: give one each"
        )
    scored = [replace(passage, score=score) for passage, score in zip(passages, scores, strict=True)]
    return sorted(scored, key=lambda passage: -(passage.score or 0.0))


@dataclass(frozen=True)
class Openings:
    """An index that searches whole passages and returns their first `words` words (0: all), so that a short
    observation shows the opening of each and not the whole of one."""

    index: Index
    words: int

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        found = self.index.search(queries, k, scopes)
        return [[self._opening(passage) for passage in passages] for passages in found] if self.words else found

    def _opening(self, passage: Passage) -> Passage:
        return replace(passage, text=" ".join(passage.text.split()[: self.words]))
