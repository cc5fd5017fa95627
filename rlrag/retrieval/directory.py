"""An index on disk: a directory with its passages, its tables, and a manifest that says what they are of.

    python -m launch.build_index --corpus=passages.jsonl.gz --kind=bm25 --out=DIR

The build streams the corpus, shows how far it is, and goes on where it stood when it was killed; the manifest is
written last, so a directory that has one is whole. Loading checks it against the files and the encoder.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.loading import load_function
from rlrag.retrieval import vectors
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import PASSAGES, StoredPassages, read_corpus, store, stored_digest
from rlrag.retrieval.index import Fused, Index, Reranked
from rlrag.retrieval.vectors import Encoder, Shape, VectorIndex

MANIFEST, PLAN, EMBEDDINGS = "manifest.json", "plan.json", "embeddings.f32"
FORMAT = 1
AT_ONCE = 4096  # passages that are encoded and written together
KINDS = ("bm25", *vectors.KINDS)


@dataclass(frozen=True)
class Plan:
    """What to build. encoder: of dense kinds, a Hugging Face directory, `minilm`, or module:function that returns one.
    k1, b: of BM25."""

    kind: str
    encoder: str = ""
    shape: Shape = field(default_factory=Shape)
    k1: float = 1.2
    b: float = 0.75

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose {', '.join(KINDS)}")
        if (self.kind == "bm25") == bool(self.encoder):
            remedy = "has no encoder" if self.encoder else "needs an encoder: give --encoder=minilm, or a directory"
            raise ValueError(f"kind {self.kind} {remedy}")
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"BM25 k1 is {self.k1} and b is {self.b}: give k1 >= 0 and 0 <= b <= 1")


Progress = Callable[[str, int, int], None]  # what is done, how many passages of how many (0: not known)


def build(corpus: Path, out: Path, plan: Plan, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Build an index, or go on with one; returns its manifest. ValueError where the directory holds another."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).exists():
        raise ValueError(f"{out} holds a finished index: choose another --out, or remove it to build anew")
    encoder = open_encoder(plan.encoder) if plan.encoder else None
    stat = corpus.stat()
    wanted = {
        "corpus": {"name": corpus.name, "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns},
        "plan": asdict(plan),
        "encoder": encoder and encoder.digest,
    }
    begun = _read(out / PLAN)
    if begun is None:
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no index: choose another --out")
        _write(out / PLAN, wanted)
    elif begun != json.loads(json.dumps(wanted)):
        different = ", ".join(name for name in wanted if begun.get(name) != json.loads(json.dumps(wanted[name])))
        raise ValueError(f"{out} holds an index begun with another {different}: choose another --out, or remove it")
    count = 0
    for count in store(read_corpus(corpus), out):
        progress("read", count, 0)
    if not count:
        raise ValueError(f"{corpus} holds no passages: give at least one")
    if encoder is None:
        for done in Bm25Index.build(out, k1=plan.k1, b=plan.b):
            progress("indexed", done, count)
    else:
        _build_dense(out, plan.shape, encoder, progress)
    (out / PLAN).unlink()
    manifest = {
        "format": FORMAT,
        "kind": plan.kind,
        "count": count,
        "corpus": {"name": corpus.name, "sha256": stored_digest(out)},
        **({"k1": plan.k1, "b": plan.b} if encoder is None else {}),
        **({} if encoder is None else _dense_part(plan, encoder, count)),
        "seconds": round(time.perf_counter() - begin, 1),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
    _write(out / MANIFEST, manifest)
    return manifest


def _dense_part(plan: Plan, encoder: Encoder, count: int) -> dict[str, Any]:
    return {
        "dims": encoder.dims,
        "encoder": {"name": encoder.name, "source": plan.encoder, "digest": encoder.digest},
        "shape": asdict(plan.shape.resolve(count, encoder.dims)),
    }


def _build_dense(out: Path, shape: Shape, encoder: Encoder, progress: Progress) -> None:
    passages = StoredPassages(out)
    path, row_bytes = out / EMBEDDINGS, 4 * encoder.dims
    shape.resolve(len(passages), encoder.dims)  # told before the work
    if not (out / vectors.FILE).exists():
        for done in _encode(passages, encoder, path, row_bytes):
            progress("encoded", done, len(passages))
        embeddings = np.memmap(path, "<f4", "r", shape=(len(passages), encoder.dims))
        vectors.write_vectors(vectors.build_vectors(embeddings, shape), out / vectors.FILE)
    path.unlink(missing_ok=True)


def _encode(passages: Sequence[Any], encoder: Encoder, path: Path, row_bytes: int) -> Iterator[int]:
    """Vectors of all passages, appended to a file of float32 rows."""
    path.touch()
    with open(path, "r+b") as file:
        done = path.stat().st_size // row_bytes // AT_ONCE * AT_ONCE
        file.truncate(done * row_bytes)
        file.seek(0, os.SEEK_END)
        for start in range(done, len(passages), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(passages)))
            texts = [f"{p.title} {p.text}".strip() for p in (passages[row] for row in rows)]
            found = np.asarray(encoder.encode_passages(texts), "<f4")
            if found.shape != (len(rows), encoder.dims) or not np.isfinite(found).all():
                raise ValueError(
                    f"the encoder {encoder.name} gave {found.shape} for {len(rows)} passages of {encoder.dims} "
                    "dimensions, or numbers that are not finite: mend it"
                )
            file.write(found.tobytes())
            file.flush()
            yield rows.stop


# -- opening ----------------------------------------------------------------------------------------------------------


def open_encoder(source: str) -> Encoder:
    """An encoder by what a user writes: a Hugging Face directory, `minilm`, or module:function that returns one."""
    if ":" in source:
        return load_function("encoder", source)()
    from rlrag.retrieval.embed import Encoder as HuggingFace  # imports JAX

    return HuggingFace.load(source)


def read_manifest(directory: Path) -> dict[str, Any]:
    """ValueError where there is none, where it is of another format, or where files are missing or cut."""
    manifest = _read(directory / MANIFEST)
    if manifest is None:
        state = "unfinished: the same build command goes on with it" if (directory / PLAN).exists() else "none there"
        raise ValueError(f"{directory} is no index ({state}): build one with python -m launch.build_index")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{directory} is an index of format {manifest.get('format')}, this reads {FORMAT}: build anew")
    for name, size in manifest["files"].items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{directory / name} {told} where the manifest says {size}: copy or build the index again")
    return manifest


def open_directory(
    directory: Path, *, encoder: Encoder | None = None, verify: bool = False, on_device: str = ""
) -> Index:
    """The index in a directory. encoder: instead of the one that the manifest names. verify: hash the passages too.
    on_device: how a flat index is searched, see open_index."""
    manifest = read_manifest(directory)
    if verify and stored_digest(directory) != manifest["corpus"]["sha256"]:
        raise ValueError(f"{directory / PASSAGES} is not what the manifest says (SHA-256): copy or build it again")
    if manifest["kind"] == "bm25":
        index = Bm25Index.load(directory)
        held = len(index)
    else:
        encoder = encoder or open_encoder(manifest["encoder"]["source"])
        if encoder.digest != manifest["encoder"]["digest"]:
            raise ValueError(
                f"{directory} was built with the encoder {manifest['encoder']['name']} "
                f"({manifest['encoder']['digest'][:12]}), this is {encoder.name} ({encoder.digest[:12]}): its queries "
                "would be vectors of another space. Give that one, or build the index anew"
            )
        shape = Shape(**manifest["shape"])
        found = vectors.read_vectors(directory / vectors.FILE, shape)
        find = found.search
        if on_device and shape.kind == "flat":
            from rlrag.retrieval.dense import DenseSearch  # imports JAX

            find = DenseSearch(vectors.Rows(found), dtype=on_device).search
        index = VectorIndex(find, StoredPassages(directory), encoder)
        held = min(found.ntotal, len(index))
    if held != manifest["count"]:
        raise ValueError(f"{directory} holds {held} passages where the manifest says {manifest['count']}: build again")
    return index


def open_index(
    source: str,
    *,
    encoder: str = "",
    rerank: str = "",
    depth: int = 100,
    verify: bool = False,
    on_device: str = "",
) -> Index:
    """An index by what a user writes: a directory; several joined by commas, fused by reciprocal rank; bm25:FILE, a
    corpus indexed in memory; or milvus:URI/COLLECTION.

    rerank: module:function(query, passages) -> scores, or `encoder`, by inner product with the query. depth: passages
    that fusing or reranking begins with. on_device: empty, or how rows of flat indexes are stored on the devices of
    this process (vectors.ON_DEVICE), which then search them instead of faiss. ValueError names what is wrong.
    """
    given = open_encoder(encoder) if encoder else None
    parts = [part for part in source.split(",") if part]
    if not parts:
        raise ValueError("index is empty: give a directory that launch.build_index made, or bm25:FILE")
    check_source(source, on_device)
    opened = []
    for part in parts:
        kind, _, file = part.partition(":")
        if kind == "milvus":
            opened.append(open_milvus(file, given))
        elif kind == "bm25" and file:
            opened.append(Bm25Index.from_jsonl(file))
        else:
            opened.append(open_directory(Path(part), encoder=given, verify=verify, on_device=on_device))
    index = opened[0] if len(opened) == 1 else Fused(tuple(opened), depth=depth)
    if not rerank:
        return index
    if rerank == "encoder":
        if given is None:
            raise ValueError("rerank is 'encoder': say which with encoder")
        return Reranked(index, by_encoder(given), depth)
    return Reranked(index, load_function("rerank", rerank), depth)


def check_source(source: str, on_device: str = "") -> None:
    """What can be told of an index before it is opened, in no time: ValueError where it is not there or not whole."""
    if on_device and on_device not in vectors.ON_DEVICE:
        raise ValueError(f"on_device is {on_device!r}: choose {', '.join(vectors.ON_DEVICE)}")
    kinds = set()
    for part in filter(None, source.split(",")):
        kind, _, file = part.partition(":")
        if kind == "bm25" and file:
            if not Path(file).is_file():
                raise ValueError(f"index is {part!r}, and {file} is no file: give bm25:FILE, JSONL of passages")
        elif kind not in ("milvus", "world"):
            kinds.add(read_manifest(Path(part))["kind"])
    if on_device and "flat" not in kinds:
        raise ValueError(f"on_device is {on_device!r}, and {source} has no flat index to search there: build one")


def open_milvus(place: str, encoder: Encoder | None) -> Index:
    """URI/COLLECTION, as passages.db/wiki or http://host:19530/wiki."""
    from rlrag.retrieval.milvus import MilvusIndex

    uri, _, collection = place.rpartition("/")
    if not uri or encoder is None:
        raise ValueError(
            f"index is 'milvus:{place}': give milvus:URI/COLLECTION, as milvus:passages.db/wiki, and an encoder"
        )
    return MilvusIndex(encoder, uri, collection)


def by_encoder(encoder: Encoder) -> Callable[[str, list[Any]], list[float]]:
    """A reranking function: the inner product of query and passage in an encoder's space (a bi-encoder)."""

    def rerank(query: str, passages: list[Any]) -> list[float]:
        if not passages:
            return []
        texts = [f"{passage.title} {passage.text}".strip() for passage in passages]
        return (encoder.encode_passages(texts) @ encoder.encode_queries([query])[0]).tolist()

    return rerank


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): build the index again") from None


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
