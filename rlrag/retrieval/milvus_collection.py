"""A connection to one Milvus collection: how it is laid out, what it says about itself, and what goes wrong with it.

The packages are imported when a connection is made: pymilvus takes 0.6 s of processor time.
"""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlrag.trajectory import SearchUnavailable

TOKEN = "MILVUS_TOKEN"  # the environment variable
# Index types, and what they are built with unless told otherwise.
INDEX_TYPES: dict[str, dict[str, int]] = {
    "FLAT": {},
    "IVF_FLAT": {"nlist": 1024},
    "HNSW": {"M": 32, "efConstruction": 200},
}
MOST_BYTES = 65_535  # of a string in UTF-8, Milvus's limit
DIMS = (2, 32_768)  # likewise

_MANIFEST, _FORMAT = "rlrag", 1  # the collection's property that holds the manifest, and its version
_NOT_THERE, _NOT_LOADED = 100, 101  # Milvus's codes
_OPENING = threading.Lock()
_LOCAL: dict[str, int] = {}  # local files that are open here -> by how many; guarded by _OPENING


class Encoder(Protocol):
    """What turns texts into vectors of length 1."""

    name: str
    digest: str  # changes with anything that changes the vectors
    dims: int

    def encode_queries(self, texts: list[str]) -> np.ndarray: ...  # float32 [n, dims]

    def encode_passages(self, texts: list[str]) -> np.ndarray: ...  # float32 [n, dims]


class Collection:
    """A connection to one collection, there or not yet. What goes wrong with it is told in one line."""

    def __init__(self, uri: str, name: str, timeout_s: float):
        self.uri, self.name, self._timeout_s = uri, name, timeout_s
        self._pymilvus, self._client, self._open = *_connect(uri, timeout_s), True

    def __str__(self) -> str:
        return f"collection {self.name!r} at {self.uri}"

    def call(self, method: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """A method of the client on this collection."""
        timeout = timeout or self._timeout_s
        try:
            try:
                return getattr(self._client, method)(self.name, timeout=timeout, **arguments)
            except Exception as error:
                if getattr(error, "code", None) != _NOT_LOADED or method not in ("search", "query"):
                    raise
            self._client.load_collection(self.name, timeout=timeout)  # a server that was started again has none loaded
            return getattr(self._client, method)(self.name, timeout=timeout, **arguments)
        except Exception as error:
            raise _told(error, str(self), method) from error

    def prepare(self, encoder: Encoder, scoped: bool, index: dict[str, Any] | None) -> dict[str, Any]:
        """Make the collection ready to be filled, as far as it is not; returns its manifest."""
        if not self.call("has_collection"):
            manifest = {
                "format": _FORMAT,
                "encoder": {"name": encoder.name, "digest": encoder.digest},
                "dims": encoder.dims,
                "scoped": scoped,
                "index": index or {"type": "FLAT", "parameters": {}},
                "count": None,
                "corpus": None,
            }
            properties = {_MANIFEST: json.dumps(manifest)}
            self.call("create_collection", schema=self._schema(encoder.dims, scoped), properties=properties)
        manifest = self.manifest(encoder)
        if manifest["scoped"] != scoped:
            held, given = ("scopes", "none") if manifest["scoped"] else ("no scopes", "some")
            raise ValueError(f"{self} has {held}, and {given} are given: fill with anew=True, or another collection")
        there = self.call("describe_index", index_name="vector")
        if index is not None and index != manifest["index"]:
            if there:
                self.call("release_collection")
                self.call("drop_index", index_name="vector")
                there = None
            manifest = self.write_manifest(manifest | {"index": index})  # before it is built, which may take long
        if not there:
            self._build(manifest["index"])
        self.call("load_collection")
        return manifest

    def _schema(self, dims: int, scoped: bool) -> Any:
        kinds = self._pymilvus.DataType
        schema = self._pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kinds.VARCHAR, max_length=MOST_BYTES, is_primary=True)
        for name in ("title", "text", *(["scope"] if scoped else [])):
            schema.add_field(name, kinds.VARCHAR, max_length=MOST_BYTES)
        schema.add_field("content", kinds.VARCHAR, max_length=32)  # a digest of title, text and scope
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=dims)
        return schema

    def _build(self, index: dict[str, Any]) -> None:
        parameters = index["parameters"]
        if self.uri.endswith(".db"):
            parameters = {"params": parameters}  # milvus-lite 3.2 looks for them there, and nowhere else
        wanted = self._client.prepare_index_params()
        wanted.add_index("vector", index_name="vector", index_type=index["type"], metric_type="IP", params=parameters)
        self.call("create_index", index_params=wanted, sync=False)  # loading waits for it

    def manifest(self, encoder: Encoder) -> dict[str, Any]:
        """What the collection says about itself. ValueError where that does not fit the encoder."""
        told = self.call("describe_collection")["properties"].get(_MANIFEST)
        if told is None:
            raise ValueError(f"{self} was not filled by fill_milvus: choose another name")
        manifest = json.loads(told)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"{self} has format {manifest['format']}, not {_FORMAT}: fill it again with anew=True")
        if manifest["dims"] != encoder.dims:
            raise ValueError(
                f"{self} holds vectors of {manifest['dims']} dimensions and {encoder.name} gives {encoder.dims}: "
                f"use {manifest['encoder']['name']}, or fill it again with anew=True"
            )
        if manifest["encoder"]["digest"] != encoder.digest:
            raise ValueError(
                f"{self} was filled with the encoder {manifest['encoder']['name']} {manifest['encoder']['digest']}, "
                f"not {encoder.name} {encoder.digest}: use that one, or fill it again with anew=True"
            )
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.call("alter_collection_properties", properties={_MANIFEST: json.dumps(manifest)})
        return manifest

    def count(self) -> int:
        (row,) = self.call("query", filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(row["count(*)"])

    def held(self, ids: list[str]) -> dict[str, str]:
        """Those of the ids that have a row, with the digest of its content."""
        chosen = f"id in [{', '.join(map(literal, ids))}]"
        rows = self.call("query", filter=chosen, output_fields=["id", "content"], consistency_level="Strong")
        return {row["id"]: row["content"] for row in rows}

    def close(self) -> None:
        if self._open:
            self._open = False
            self._client.close()
            _release(self.uri)


def _connect(uri: str, timeout_s: float) -> tuple[Any, Any]:
    """The package pymilvus (0.6 s to import) and a client of its own connection, closed when it is closed."""
    local = uri.endswith(".db")
    if not local and not uri.startswith(("http://", "https://", "tcp://", "unix:")):
        raise ValueError(f"uri is {uri!r}: give http://host:19530, or the path of a local file that ends in .db")
    if not local and "@" in uri:
        raise ValueError(f"the uri of {uri.rsplit('@', 1)[1]} holds a password: put user:password into {TOKEN}")
    try:
        import pymilvus  # type: ignore[import-not-found]  # an optional extra

        if local:
            import milvus_lite  # type: ignore[import-not-found]  # noqa: F401  # what pymilvus opens a file with
    except ImportError as error:
        raise ValueError(
            f"Milvus needs packages that are not installed ({error}): pip install 'rlrag[milvus]'"
        ) from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs a stack trace of whatever it raises
    options: dict[str, Any] = {"timeout": timeout_s, "dedicated": True}
    if not local:
        try:
            return pymilvus, pymilvus.MilvusClient(uri, token=os.environ.get(TOKEN, ""), **options)
        except Exception as error:
            raise _told(error, f"Milvus at {uri}", "connecting") from error
    path = os.path.abspath(uri)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _OPENING, _Heard("milvus_lite.server_manager") as heard:
        try:
            client = pymilvus.MilvusClient(path, **options)
        except Exception as error:
            raise _told(heard.error or error, uri, "opening (one process at a time may have it open)") from error
        _LOCAL[path] = _LOCAL.get(path, 0) + 1
    return pymilvus, client


def _release(uri: str) -> None:
    """Close a local file that nobody here uses any more, so that another process can open it."""
    path = os.path.abspath(uri)
    with _OPENING:
        if path in _LOCAL:
            _LOCAL[path] -= 1
            if not _LOCAL[path]:
                del _LOCAL[path]
                from milvus_lite.server_manager import server_manager_instance  # type: ignore[import-not-found]

                server_manager_instance.release_server(path)


class _Heard(logging.Handler):
    """Keeps the exception that a logger is told about, which would be lost otherwise, and keeps it from the console."""

    def __init__(self, logger: str):
        super().__init__()
        self._logger, self.error = logging.getLogger(logger), None

    def emit(self, record: logging.LogRecord) -> None:
        self.error = record.exc_info[1] if record.exc_info else self.error

    def __enter__(self) -> "_Heard":
        self._logger.addHandler(self)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.propagate = True
        self._logger.removeHandler(self)


def _told(error: BaseException, where: str, doing: str) -> Exception:
    """What went wrong, in one line: ValueError where the user can mend it, else SearchUnavailable."""
    import grpc  # type: ignore[import-not-found]  # with pymilvus

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:  # pymilvus raises errors from themselves
        chain.append(cause)
        cause = cause.__cause__
    codes = {e.code() for e in chain if isinstance(e, grpc.Call)}
    if grpc.StatusCode.UNAUTHENTICATED in codes:
        state = "is refused" if os.environ.get(TOKEN) else "is not set"
        return ValueError(f"{where} wants a token, and that in {TOKEN} {state}: set it to user:password, or an API key")
    if getattr(error, "code", None) == _NOT_THERE:
        return ValueError(f"{where} is not there: fill it first, with fill_milvus")
    if grpc.StatusCode.DEADLINE_EXCEEDED in codes:
        return SearchUnavailable(f"{where}: {doing}: no answer in time, see timeout_s")
    said = error.details() if isinstance(error, grpc.Call) else getattr(error, "message", None) or str(error)
    return SearchUnavailable(f"{where}: {doing} failed: {type(error).__name__}: {' '.join(str(said).split())[:300]}")


def literal(text: str) -> str:
    """A string in Milvus's filter language, whatever it holds: nothing in it ends the string."""
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escaped)
    return f'"{text}"'
