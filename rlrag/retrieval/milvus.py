"""Milvus as the engine for corpora that outgrow one host: vectors and texts live on its servers.

    fill_milvus(read_corpus("passages.jsonl.gz"), encoder, "passages.db", "wiki")      # a local file: milvus-lite
    fill_milvus(read_corpus("passages.jsonl.gz"), encoder, "http://host:19530", "wiki")  # the same, on a cluster
    index = MilvusIndex(encoder, "http://host:19530", "wiki")

A cluster's token is read from the environment variable MILVUS_TOKEN and nowhere else, so that it stands in no command
line, configuration or log. `pip install 'rlrag[milvus]'` brings the packages; they are imported when first needed.
"""

import hashlib
import itertools
import json
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.retrieval.milvus_collection import DIMS, INDEX_TYPES, MOST_BYTES, Collection, Encoder, literal
from rlrag.trajectory import Passage, SearchUnavailable

# What a search looks at unless told otherwise.
SEARCH_PARAMETERS: dict[str, dict[str, int]] = {"FLAT": {}, "IVF_FLAT": {"nprobe": 16}, "HNSW": {"ef": 64}}
CONSISTENCY = ("Strong", "Bounded", "Session", "Eventually")
MOST_HITS = 16_384  # of a query, Milvus's limit
_REQUEST_BYTES = 8 << 20  # of an upsert; servers take 64 MiB


class MilvusIndex:
    """The passages of a collection that are nearest to a query, best first. Safe to search from many threads at once
    (as far as the encoder is).

    Scores are inner products. Equal ones are ordered by id, and which of them are among the k best goes by id, too
    (among the first 16,384 hits). With a FLAT index the answers are those of an exact search.

    parameters: how much of an approximate index a search looks at ({"nprobe": 64}, {"ef": 256}).
    consistency: which writes a search must see; Bounded may miss those of the last seconds. A local file is always
      Strong.
    timeout_s: seconds that opening may take, and every search.

    Raises ValueError, with the remedy, for a missing package, file or collection, a collection that is not filled to
    its end, and one of another encoder; SearchUnavailable, in one line, for anything that goes wrong with the server.
    """

    def __init__(
        self,
        encoder: Encoder,
        uri: str,
        collection: str,
        *,
        parameters: dict[str, int] | None = None,
        consistency: str = "Bounded",
        timeout_s: float = 10.0,
    ):
        if consistency not in CONSISTENCY:
            raise ValueError(f"consistency is {consistency!r}: choose {', '.join(CONSISTENCY)}")
        if uri.endswith(".db") and not Path(uri).exists():
            raise ValueError(f"{uri} is not there: fill it first, with fill_milvus")
        self._encoder, self._timeout_s, self._closed = encoder, timeout_s, False
        self._collection = Collection(uri, collection, timeout_s)
        try:
            self.manifest = self._collection.manifest(encoder)
            if self.manifest["count"] is None:
                raise ValueError(f"{self._collection} is not filled to its end: run fill_milvus again, it goes on")
            self._collection.call("load_collection", timeout=timeout_s)
        except BaseException:
            self._collection.close()
            raise
        self._consistency = consistency
        self._parameters = SEARCH_PARAMETERS[self.manifest["index"]["type"]] | (parameters or {})

    def __len__(self) -> int:
        return self.manifest["count"]

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """The k best passages of each query; fewer where the corpus, or the scope, holds fewer.

        Queries of one scope go to the server together, those of different scopes one scope after the other.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries is the string {queries!r}: give a sequence of strings")
        if not 1 <= k <= MOST_HITS:
            raise ValueError(f"k is {k}: ask for 1 to {MOST_HITS} passages")
        if scopes is not None and len(scopes) != len(queries):
            raise ValueError(
                f"{len(scopes)} scopes for {len(queries)} queries: give one scope (or None) for each query"
            )
        scope = next((scope for scope in scopes or () if scope is not None), None)
        if "" in (scopes or ()):
            raise ValueError("a scope is '': give the name of a sub-corpus, or None for the whole")
        if scope is not None and not self.manifest["scoped"]:
            raise ValueError(f"{self._collection} has no scopes, and {scope!r} is asked for: fill it with a scope")
        if self._closed:
            raise SearchUnavailable("the index was closed")
        if not queries:
            return []
        deadline = time.monotonic() + self._timeout_s
        vectors = _unit(self._encoder.encode_queries(list(queries)), len(queries), self._encoder)
        rows_of: dict[str | None, list[int]] = defaultdict(list)
        for row, scope in enumerate(scopes or [None] * len(queries)):
            rows_of[scope].append(row)
        found: dict[int, list[Passage]] = {}
        for scope, rows in rows_of.items():
            at_once = max(1, MOST_HITS // (k + 1))  # keeps an answer within tens of megabytes
            for start in range(0, len(rows), at_once):
                some = rows[start : start + at_once]
                found |= zip(some, self._nearest(vectors[some], k, scope, deadline), strict=True)
        return [found[row] for row in range(len(queries))]

    def close(self) -> None:
        """Give up the connection; a search after it raises SearchUnavailable."""
        self._closed = True
        self._collection.close()

    def _nearest(self, vectors: np.ndarray, k: int, scope: str | None, deadline: float) -> list[list[Passage]]:
        """The k best for each of the vectors [n, D].

        One more is asked for than is wanted: where it equals the last, the server's choice among equals is arbitrary,
        and more are asked for until one is worse.
        """
        if scope is not None:
            _check_text(scope, "scope", f"a search in {scope[:40]!r}")
        chosen, limit = "" if scope is None else f"scope == {literal(scope)}", min(k + 1, MOST_HITS)
        found: list[list[Passage]] = [[] for _ in vectors]
        pending = list(range(len(vectors)))
        while pending:
            for row, hits in zip(pending, self._ask(vectors[pending], limit, chosen, deadline), strict=True):
                found[row] = hits
            if limit == MOST_HITS:
                break
            pending = [
                row for row in pending if len(found[row]) == limit and found[row][-1].score == found[row][k - 1].score
            ]
            limit = min(2 * limit, MOST_HITS)
        if scope is not None and not all(found) and not self._any(chosen, deadline):
            raise ValueError(
                f"{self._collection} has no passage of the scope {scope!r}: ask for one that was filled in"
            )
        return [sorted(hits, key=lambda hit: (-(hit.score or 0.0), hit.id))[:k] for hits in found]

    def _ask(self, vectors: np.ndarray, limit: int, chosen: str, deadline: float) -> list[list[Passage]]:
        parameters = dict(self._parameters)
        if "ef" in parameters:
            parameters["ef"] = max(parameters["ef"], limit)  # HNSW wants at least as many as it is to find
        answers = self._collection.call(
            "search",
            data=list(vectors),
            anns_field="vector",
            filter=chosen,
            limit=limit,
            output_fields=["title", "text"],
            search_params={"metric_type": "IP", "params": parameters},
            consistency_level=self._consistency,
            timeout=self._left(deadline),
        )
        if len(answers) != len(vectors):
            raise SearchUnavailable(f"{self._collection} answered {len(answers)} of {len(vectors)} queries")
        return [
            [Passage(hit["id"], hit["entity"]["title"], hit["entity"]["text"], hit["distance"]) for hit in hits]
            for hits in answers
        ]

    def _any(self, chosen: str, deadline: float) -> bool:
        left_s = self._left(deadline)
        return bool(self._collection.call("query", filter=chosen, output_fields=["id"], limit=1, timeout=left_s))

    def _left(self, deadline: float) -> float:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise SearchUnavailable(f"{self._collection}: no answer within {self._timeout_s:g} s")
        return left_s


def fill_milvus(
    passages: Iterable[Passage],
    encoder: Encoder,
    uri: str,
    collection: str,
    *,
    scope: Callable[[Passage], str | None] | None = None,
    index_type: str | None = None,
    index_parameters: dict[str, int] | None = None,
    batch_size: int = 512,
    anew: bool = False,
    timeout_s: float = 120.0,
    progress: Callable[[int, int], None] = lambda read, written: None,
) -> dict[str, Any]:
    """Bring a collection to hold these passages, each encoded as title + " " + text; returns its manifest.

    Passages are read once, in batches. Those that the collection holds already, equal in title, text and scope, are
    neither encoded nor written again, the others are written under their ids: a fill that was killed goes on when it
    is run again, and no row is lost or doubled. The manifest calls a collection whole (count, corpus: SHA-256 of the
    passages as JSONL rows of id, title and text) only after its rows were counted.

    scope: names the sub-corpus of a passage (None: it is in none); a collection has scopes or it has none.
    index_type: FLAT (exact; the default of a new collection), IVF_FLAT or HNSW; another one than the collection has is
      built from the vectors that are there. index_parameters: {"nlist": ...}, {"M": ..., "efConstruction": ...}.
    anew: drop the collection first. timeout_s: of every request.
    progress: called after every batch with how many passages were read and how many of them written.

    Raises ValueError, with the remedy, for passages that Milvus cannot hold (their ids are named), a collection of
    another encoder, and rows that do not agree with the passages; SearchUnavailable for what goes wrong with the
    server.
    """
    if index_type is not None and index_type not in INDEX_TYPES:
        raise ValueError(f"index_type is {index_type!r}: choose {', '.join(INDEX_TYPES)}")
    if index_parameters is not None and index_type is None:
        raise ValueError(f"index_parameters is {index_parameters} without an index_type: give both")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    if not DIMS[0] <= encoder.dims <= DIMS[1]:
        raise ValueError(
            f"{encoder.name} has {encoder.dims} dimensions: Milvus holds vectors of {DIMS[0]} to {DIMS[1]}"
        )
    batches = _batches((_row(passage, scope) for passage in passages), encoder.dims, batch_size)
    first = next(batches, None)
    if first is None:
        raise ValueError("the corpus holds no passages: give at least one")
    index = None
    if index_type is not None:
        index = {"type": index_type, "parameters": INDEX_TYPES[index_type] | (index_parameters or {})}
    target = Collection(uri, collection, timeout_s)
    try:
        if anew and target.call("has_collection"):
            target.call("drop_collection")
        manifest = target.prepare(encoder, scope is not None, index)
        corpus, ids = hashlib.sha256(), array("Q")  # ids: 8 bytes each, so that a doubled one is found among millions
        met, written, before = 0, 0, target.count()  # met: how many of the rows that were there before
        for batch in itertools.chain([first], batches):
            held = target.held([row["id"] for row in batch]) if met < before else {}
            new = [row for row in batch if held.get(row["id"]) != row["content"]]
            if new:
                if manifest["count"] is not None:  # what was whole is not, until the end
                    manifest = target.write_manifest(manifest | {"count": None, "corpus": None})
                texts = [f"{row['title']} {row['text']}".strip() for row in new]
                vectors = _unit(encoder.encode_passages(texts), len(texts), encoder)
                target.call("upsert", data=[row | {"vector": vector} for row, vector in zip(new, vectors, strict=True)])
            for row in batch:
                fields = {"id": row["id"], "title": row["title"], "text": row["text"]}
                corpus.update(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
                ids.append(int.from_bytes(hashlib.blake2b(row["id"].encode(), digest_size=8).digest(), "big"))
            met, written = met + len(held), written + len(new)
            progress(len(ids), written)
        _check_doubled(ids)
        target.call("flush")
        rows = target.count()
        if rows < len(ids):
            raise SearchUnavailable(f"{target} holds {rows} rows of {len(ids)} that were written: run the fill again")
        if rows > len(ids):
            raise ValueError(
                f"{target} holds {rows - len(ids)} rows of passages that are not among these {len(ids)}: "
                "fill with anew=True, or another collection"
            )
        return target.write_manifest(manifest | {"count": rows, "corpus": corpus.hexdigest()})
    finally:
        target.close()


def _batches(rows: Iterable[dict[str, str]], dims: int, size: int) -> Iterator[list[dict[str, str]]]:
    """Batches of at most `size` rows that fit into one request. ValueError for an id that comes twice in a batch."""
    batch: dict[str, dict[str, str]] = {}
    weight = 0
    for row in rows:
        heavy = 4 * dims + sum(len(value.encode()) for value in row.values())
        if batch and (len(batch) == size or weight + heavy > _REQUEST_BYTES):
            yield list(batch.values())
            batch, weight = {}, 0
        if row["id"] in batch:
            raise ValueError(f"the id {row['id'][:80]!r} comes twice: give each passage its own")
        batch[row["id"]] = row
        weight += heavy
    if batch:
        yield list(batch.values())


def _row(passage: Passage, scope: Callable[[Passage], str | None] | None) -> dict[str, str]:
    """A passage as Milvus holds it, without its vector. ValueError for what it cannot hold, naming the id."""
    row, named = {"id": passage.id, "title": passage.title, "text": passage.text}, f"the passage {passage.id[:80]!r}"
    if not passage.id:
        raise ValueError(f"a passage has no id (its text begins {passage.text[:40]!r}): give each its own")
    if scope is not None:
        chosen = scope(passage)
        row["scope"] = "" if chosen is None else chosen
        if chosen == "":
            raise ValueError(f"{named} has an empty scope: give it a name, or None for no scope")
    for field, value in row.items():
        _check_text(value, field, named)
    content = json.dumps([row["title"], row["text"], row.get("scope")]).encode()
    return row | {"content": hashlib.blake2b(content, digest_size=16).hexdigest()}


def _check_text(value: str, field: str, named: str) -> None:
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{named}: its {field} is not UTF-8 ({error.reason}): mend it") from None
    if length > MOST_BYTES:
        raise ValueError(f"{named}: its {field} has {length} bytes, Milvus holds {MOST_BYTES}: split or shorten it")


def _check_doubled(ids: array) -> None:
    """ValueError where two passages have one id. ids: a hash of each."""
    hashes = np.frombuffer(ids, np.uint64)
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(twice):
        one, other = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise ValueError(f"passages {one} and {other} of the corpus have the same id: give each its own")


def _unit(vectors: np.ndarray, count: int, encoder: Encoder) -> np.ndarray:
    """The encoder's vectors as float32 [count, dims]. ValueError where they are not that, or not of length 1."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (count, encoder.dims):
        raise ValueError(f"{encoder.name} gave {vectors.shape} for {count} texts of {encoder.dims} dimensions: mend it")
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) < 0.01).all():  # 0.01: rounding in bfloat16; NaN fails, too
        raise ValueError(
            f"{encoder.name} gave a vector of length {lengths[np.argmax(np.abs(lengths - 1))]:g}: normalise"
        )
    return vectors
