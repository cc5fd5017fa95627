"""Dense retrieval: passages and queries as vectors of an encoder, nearest by inner product, found by faiss.

Kinds: `flat` (exact), `ivf` (lists around centroids, of which `nprobe` are read), `hnsw` (a graph), `pq` (codes of a
byte or less for each part of a vector). Storage of the vectors: fp32, fp16 or int8 (a byte a dimension).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlrag.retrieval.index import check_request
from rlrag.trajectory import Passage

STORAGES = {"fp32": "Flat", "fp16": "SQfp16", "int8": "SQ8"}
KINDS = ("flat", "ivf", "hnsw", "pq")
ON_DEVICE = ("float32", "bfloat16", "float16", "int8")  # rows of rlrag.retrieval.dense
FILE = "vectors.faiss"

# Queries [Q, D] and k -> scores [Q, k], rows [Q, k]; -1 where there are fewer than k.
Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Encoder(Protocol):
    """What turns texts into vectors (rlrag.retrieval.embed has those of Hugging Face checkpoints)."""

    name: str
    digest: str  # changes with the weights, the tokenizer and the settings
    dims: int

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray: ...  # float32 [n, dims]

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray: ...  # float32 [n, dims]


@dataclass(frozen=True)
class Shape:
    """How vectors are kept and looked for. 0: chosen by their number.

    lists, probes: of ivf, centroids and how many lists a search reads. links, effort: of hnsw, edges a node and the
    candidates of a search. parts: of pq, bytes a vector; dims must be a multiple.
    """

    kind: str = "flat"
    storage: str = "fp32"
    lists: int = 0
    probes: int = 16
    links: int = 32
    effort: int = 64
    parts: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose {', '.join(KINDS)}")
        if self.storage not in STORAGES:
            raise ValueError(f"storage is {self.storage!r}: choose {', '.join(STORAGES)}")
        for name in ("probes", "links", "effort"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")

    def resolve(self, count: int, dims: int) -> "Shape":
        """With every number chosen, for so many vectors of so many dimensions. ValueError for what cannot be."""
        # 4 sqrt(N) lists, at least 39 vectors each, as faiss asks for.
        lists = self.lists or max(1, min(int(4 * math.sqrt(count)), count // 39))
        parts = self.parts or next(p for p in (dims // 4, dims // 2, dims, 1) if p and dims % p == 0)
        if dims % parts:
            raise ValueError(f"parts is {parts}, which does not divide the {dims} dimensions: choose a divisor")
        if self.kind == "pq" and count < 256:
            raise ValueError(f"kind pq learns 256 codes and there are {count} vectors: choose flat")
        return replace(self, lists=lists, parts=parts)

    @property
    def factory(self) -> str:
        """The name that faiss's index_factory knows it by."""
        vectors = STORAGES[self.storage]
        return {
            "flat": vectors,
            "ivf": f"IVF{self.lists},{vectors}",
            "hnsw": f"HNSW{self.links},{vectors}",
            "pq": f"PQ{self.parts}x8",
        }[self.kind]


def import_faiss() -> Any:
    """faiss, with matrix products for every batch. Its own threshold sends batches of less than 128,000 dot products
    a vector down a path that is 5 to 7 times slower (docs/LOG.md)."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 8
    return faiss


def build_vectors(embeddings: np.ndarray, shape: Shape, *, seed: int = 0) -> Any:
    """A faiss index of float32 [N, D]; rows are added in slices, so that a memory map is never read as a whole."""
    faiss = import_faiss()
    count, dims = embeddings.shape
    shape = shape.resolve(count, dims)
    index = faiss.index_factory(dims, shape.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        wanted = 256 * max(256, shape.lists if shape.kind == "ivf" else 0)
        sample = np.sort(np.random.default_rng(seed).permutation(count)[:wanted])
        index.train(np.ascontiguousarray(embeddings[sample], np.float32))
    for start in range(0, count, 65536):
        index.add(np.ascontiguousarray(embeddings[start : start + 65536], np.float32))
    set_search(index, shape)
    return index


def set_search(index: Any, shape: Shape) -> None:
    """How much of an approximate index a search looks at."""
    if shape.kind == "ivf":
        index.nprobe = shape.probes
    if shape.kind == "hnsw":
        index.hnsw.efSearch = shape.effort


def write_vectors(index: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    import_faiss().write_index(index, str(part))
    part.replace(path)


def read_vectors(path: Path, shape: Shape) -> Any:
    """The index in a file, mapped into memory where its kind allows: processes that read it share it."""
    faiss = import_faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if shape.kind != "ivf" else faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ValueError(f"{path} is no faiss index ({str(error).splitlines()[-1][:200]}): build it again") from None
    set_search(index, shape)
    return index


class Rows:
    """The vectors of a faiss index as a matrix [N, D] of float32, slice by slice."""

    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, index: Any):
        self.index, self.shape = index, (index.ntotal, index.d)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        return self.index.reconstruct_n(start, stop - start)

    def __len__(self) -> int:
        return self.shape[0]


class VectorIndex:
    """Passages nearest to a query in an encoder's space. Safe to search from many threads at once."""

    def __init__(self, find: Find, passages: Sequence[Passage], encoder: Encoder):
        self.find, self.passages, self.encoder = find, passages, encoder

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        """The k nearest passages of each query with their inner products; equal ones in corpus order."""
        check_request(queries, k, scopes, scoped=False)
        if not queries:
            return []
        scores, rows = self.find(self.encoder.encode_queries(list(queries)), min(k, len(self.passages)))
        return [self._passages(*found) for found in zip(scores, rows, strict=True)]

    def _passages(self, scores: np.ndarray, rows: np.ndarray) -> list[Passage]:
        order = np.lexsort((rows, -scores))
        return [
            replace(self.passages[row], score=score)
            for score, row in zip(scores[order].tolist(), rows[order].tolist(), strict=True)
            if row >= 0
        ]
