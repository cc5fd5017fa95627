"""How good a ranking is: the measures of trec_eval, and the files they are read from (BEIR's layout).

A run is {query: {passage: score}}, judgments are {query: {passage: relevance}}. As in trec_eval passages are ranked by
score, equal ones by id, the larger first, and a query without a relevant passage is not counted.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rlrag.retrieval.index import Index

Run = Mapping[str, Mapping[str, float]]
Judgments = Mapping[str, Mapping[str, int]]


def recall(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """Share of the relevant passages among the first k (trec_eval's recall_k)."""
    return sum(r > 0 for r in relevances[:k]) / len(ideal)


def precision(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """Share of the first k that is relevant (P_k); what is missing counts as irrelevant."""
    return sum(r > 0 for r in relevances[:k]) / k


def ndcg(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """DCG over the best possible DCG, DCG = sum of relevance / log2(rank + 1) over the first k (Jarvelin and Kekalainen
    2002 with linear gain, ndcg_cut_k)."""

    def dcg(values: Sequence[int]) -> float:
        return sum(max(r, 0) / math.log2(rank + 1) for rank, r in enumerate(values[:k], 1))

    return dcg(relevances) / dcg(ideal)


def average_precision(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """Mean over the relevant passages of the precision at their rank, 0 for those not among the first k (map_cut_k)."""
    found, total = 0, 0.0
    for rank, r in enumerate(relevances[:k], 1):
        if r > 0:
            found += 1
            total += found / rank
    return total / len(ideal)


def reciprocal_rank(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """1 over the rank of the first relevant passage, 0 where it is not among the first k (recip_rank)."""
    return next((1 / rank for rank, r in enumerate(relevances[:k], 1) if r > 0), 0.0)


def completeness(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """Whether every relevant passage is among the first k (Comprehensiveness of Qu et al. 2024, ToolRet)."""
    return float(sum(r > 0 for r in relevances[:k]) == len(ideal))


MEASURES: dict[str, Callable[[Sequence[int], Sequence[int], int], float]] = {
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "map": average_precision,
    "mrr": reciprocal_rank,
    "completeness": completeness,
}


def measure(run: Run, judgments: Judgments, wanted: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per query, each of the wanted measures, named as "ndcg@10". A query that the run lacks found nothing."""
    parsed = [(name, *parse(name)) for name in wanted]
    found = {}
    for query, judged in judgments.items():
        ideal = sorted((r for r in judged.values() if r > 0), reverse=True)
        if not ideal:
            continue
        # By id first, then, stably, by score: equal scores are left with the larger id first.
        ranked = sorted(sorted(run.get(query, {}).items(), reverse=True), key=lambda pair: -pair[1])
        relevances = [judged.get(id, 0) for id, _ in ranked]
        found[query] = {name: function(relevances, ideal, k) for name, function, k in parsed}
    return found


def parse(name: str) -> tuple[Callable[[Sequence[int], Sequence[int], int], float], int]:
    kind, _, k = name.partition("@")
    if kind not in MEASURES or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"measure is {name!r}: give one of {', '.join(MEASURES)} with a rank, as ndcg@10")
    return MEASURES[kind], int(k)


def mean(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over queries. ValueError where there is none."""
    if not per_query:
        raise ValueError("no query has a relevant passage: do queries and judgments belong together?")
    names = next(iter(per_query.values()))
    return {name: sum(values[name] for values in per_query.values()) / len(per_query) for name in names}


def search_all(index: Index, queries: Mapping[str, str], k: int, at_once: int = 64) -> dict[str, dict[str, float]]:
    """The run of an index. Scores are the ranks' own, so that equal ones keep the order in which they were found."""
    ids, run = list(queries), {}
    for start in range(0, len(ids), at_once):
        part = ids[start : start + at_once]
        found = index.search([queries[id] for id in part], k)
        for id, passages in zip(part, found, strict=True):
            run[id] = {passage.id: float(len(passages) - rank) for rank, passage in enumerate(passages)}
    return run


def read_queries(path: Path) -> dict[str, str]:
    """JSONL of BEIR's {_id, text}, or {id, question}; .gz allowed."""
    queries = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            id, text = str(row.get("_id", row.get("id"))), row.get("text", row.get("question"))
        except (ValueError, AttributeError):
            id, text = "None", None
        if id == "None" or not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: give an object with _id and text, or id and question")
        queries[id] = text
    return queries


def read_judgments(path: Path) -> dict[str, dict[str, int]]:
    """BEIR's qrels: tab-separated query-id, corpus-id, score under a header; or TREC's four columns; .gz allowed."""
    judgments: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        fields = line.split()
        if number == 1 and fields and not fields[-1].lstrip("-").isdecimal():
            continue  # the header
        if len(fields) not in (3, 4) or not fields[-1].lstrip("-").isdecimal():
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:60]!r}: give query-id, corpus-id and a whole score"
            )
        judgments.setdefault(fields[0], {})[fields[-2]] = int(fields[-1])
    return judgments


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt", encoding="utf-8") if packed else open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
