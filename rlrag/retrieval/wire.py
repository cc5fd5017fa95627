"""What goes over the network: POST /retrieve as JSON, in every dialect that is spoken, both ways.

    dialect    request                                               result of the reply, with and without scores
    search_r1  {"queries": [text], "topk", "return_scores"}          [[{"document", "score"}]] or [[document]]
    skyrl      {"query": text, "topk", "return_scores"}              the same, an outer list of one
    slime      {"queries": [text], "topk", "return_scores": false}   either is understood
    rerank     {"queries", "topk_retrieval", "topk_rerank", "return_scores"}   documents are strings
    web        {"queries": [text]}                                   [[{"document": {"contents"}}]]

A document is {"id", "contents"}, contents = the title in double quotes, a newline, the text; `title` and `text` come
along where contents alone would not say them exactly. topk 0, null or absent is the server's own number. Ours beside
all that: `scopes`, a sub-corpus or null for each query. An error is {"detail": reason} with a status of 400 or above.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from rlrag.retrieval.corpus import split_contents
from rlrag.trajectory import Passage

DIALECTS = ("search_r1", "skyrl", "slime", "rerank", "web")
FIELDS = {"queries", "query", "topk", "return_scores", "topk_retrieval", "topk_rerank", "scopes"}


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and why in one line. retry_after_s: when to ask again."""

    def __init__(self, status: int, reason: str, retry_after_s: float | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 2**20
    queries: int = 1024
    query_characters: int = 8192
    k: int = 1000


@dataclass(frozen=True)
class Wanted:
    """A request. retrieve: passages to find before the best k of them are chosen (rerank), else None. form: of a
    passage in the reply: "scored" {"document", "score"}, "wrapped" {"document"}, "bare". text: documents are strings.
    """

    queries: list[str]
    k: int
    scopes: list[str | None] | None = None
    retrieve: int | None = None
    form: str = "bare"
    text: bool = False


# -- the server's side ------------------------------------------------------------------------------------------------


def parse_request(body: bytes, limits: Limits, default_k: int, default_retrieve: int = 10) -> Wanted:
    """What a body asks for, in whatever dialect. Raises Refused (400) naming the field, its value and what to give."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refused(400, f"the body is a JSON {type(fields).__name__}: give an object with queries")
    if ("query" in fields) == ("queries" in fields):
        raise Refused(400, "give either queries, a list of strings, or query, one string")
    queries = fields["queries"] if "queries" in fields else [fields["query"]]
    if not isinstance(queries, list) or not queries:
        raise Refused(400, f"queries is {_short(queries)}: give a list of at least one string")
    if len(queries) > limits.queries:
        raise Refused(400, f"queries has {len(queries)} entries: at most {limits.queries} a request")
    for query in queries:
        if not isinstance(query, str):
            raise Refused(400, f"a query is {_short(query)}: give a string")
        if len(query) > limits.query_characters:
            raise Refused(400, f"a query has {len(query)} characters: at most {limits.query_characters}")
    scores = fields.get("return_scores", False)
    if not isinstance(scores, bool) and scores is not None:
        raise Refused(400, f"return_scores is {_short(scores)}: give true or false")
    scopes = _scopes(fields.get("scopes"), len(queries))
    if "topk_retrieval" in fields or "topk_rerank" in fields:
        k = _count(fields, "topk_rerank", default_k, limits.k)
        retrieve = max(k, _count(fields, "topk_retrieval", max(default_retrieve, k), limits.k))
        return Wanted(queries, k, scopes, retrieve, "scored" if scores else "bare", text=True)
    k = _count(fields, "topk", default_k, limits.k)
    if scores:
        form = "scored"
    else:  # a web client says neither and reads wrapped documents
        form = "bare" if "return_scores" in fields or "topk" in fields or "query" in fields else "wrapped"
    return Wanted(queries, k, scopes, None, form)


def _count(fields: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = fields.get(name)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise Refused(400, f"{name} is {_short(value)}: give a whole number from 1 to {most}, or null")
    return value


def _scopes(value: Any, number: int) -> list[str | None] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != number or not all(s is None or isinstance(s, str) for s in value):
        raise Refused(400, f"scopes is {_short(value)}: give a string or null for each of the {number} queries")
    return value if any(scope is not None for scope in value) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def document(passage: Passage) -> dict[str, Any]:
    contents = f'"{passage.title}"\n{passage.text}'
    plain = {"id": passage.id, "contents": contents}
    if "\n" in passage.title:
        return plain | {"title": passage.title, "text": passage.text}
    return plain


def build_reply(wanted: Wanted, found: Sequence[Sequence[Passage]]) -> bytes:
    """The reply in the request's dialect."""

    def entry(passage: Passage) -> Any:
        shown = f'"{passage.title}"\n{passage.text}' if wanted.text else document(passage)
        if wanted.form == "bare":
            return shown
        return {"document": shown, "score": passage.score} if wanted.form == "scored" else {"document": shown}

    return orjson.dumps({"result": [[entry(passage) for passage in passages] for passages in found]})


# -- the client's side ------------------------------------------------------------------------------------------------


def build_requests(
    dialect: str, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None, most: int
) -> list[tuple[int, bytes]]:
    """Bodies that ask for everything, each with how many queries it holds, at most `most`."""
    at_once = 1 if dialect in ("skyrl", "slime") else most
    bodies = []
    for start in range(0, len(queries), at_once):
        part = list(queries[start : start + at_once])
        fields: dict[str, Any] = {"query": part[0]} if dialect == "skyrl" else {"queries": part}
        if dialect == "rerank":
            fields |= {"topk_retrieval": max(10, k), "topk_rerank": k, "return_scores": True}
        elif dialect != "web":
            fields |= {"topk": k, "return_scores": dialect != "slime"}
        own = list(scopes[start : start + at_once]) if scopes is not None else []
        if any(scope is not None for scope in own):
            fields["scopes"] = own
        bodies.append((len(part), orjson.dumps(fields)))
    return bodies


def parse_reply(body: bytes, number: int, k: int) -> list[list[Passage]]:
    """Passages for each query of a request, at most k, whatever the dialect: a score that is not given is None, an id
    that is not given the document's own text's beginning. ValueError where it is no such reply."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the server's reply is no JSON ({error})") from None
    result = fields.get("result") if isinstance(fields, dict) else None
    if not isinstance(result, list):
        raise ValueError(f"the server's reply has no list `result`: {_short(fields)}")
    if number == 1 and result and all(isinstance(entry, dict | str) for entry in result):
        result = [result]  # one query, its documents without the outer list
    if len(result) != number:
        raise ValueError(f"the server answered {len(result)} of {number} queries")
    for entries in result:
        if not isinstance(entries, list):
            raise ValueError(f"the results of a query in the server's reply are {_short(entries)}, no list")
    return [[_passage(entry) for entry in entries[:k]] for entries in result]


def _passage(entry: Any) -> Passage:
    score = None
    if isinstance(entry, dict) and "document" in entry:
        score, entry = entry.get("score"), entry["document"]
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"a score in the server's reply is {_short(score)}, no number")
    fields = {"contents": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict):
        raise ValueError(f"a document in the server's reply is {_short(entry)}")
    if isinstance(fields.get("title"), str) and isinstance(fields.get("text"), str):
        title, text = fields["title"], fields["text"]
    elif isinstance(fields.get("contents"), str):
        title, text = split_contents(fields["contents"])
    else:
        raise ValueError(f"a document in the server's reply has no contents: {_short(entry)}")
    id = fields.get("id")
    return Passage(str(id) if id is not None else f"{title}\n{text}"[:64], title, text, score)
