"""Vectors of texts by an encoder in JAX: for building a dense index, and for every query that searches it.

Texts are tokenised with `tokenizers`, sorted by length and padded to few lengths and few row counts, so that few
programs are compiled: [rows, tokens] int32 in, [rows, D] float32 out. Torch is deliberately absent.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from rlrag.mesh import DATA, make_mesh, sharding
from rlrag.model import families, hf
from rlrag.model.architecture import Architecture, EncoderArchitecture
from rlrag.model.bert import Bert
from rlrag.model.parameters import Transformer
from rlrag.model.pooling import embed
from rlrag.retrieval.encoder_settings import EncoderSettings, read_encoder_folder

_TOKENIZED_AT_ONCE = 8192  # texts: what the tokenizer returns is some hundred times larger than the ids kept of it


class Encoder:
    """Texts to vectors. Safe to call from many threads at once.

    name, dims (D), settings; digest: SHA-256 in hexadecimal over config, weights, tokenizer, settings and dtype, so
    that an index can tell whether its vectors are of this encoder.
    """

    def __init__(
        self,
        params: Bert | Transformer,
        architecture: EncoderArchitecture | Architecture,
        tokenizer: tokenizers.Tokenizer,
        settings: EncoderSettings,
        *,
        name: str,
        digest: str,
        batch_tokens: int = 2048,
        mesh: Mesh | None = None,
    ):
        """tokenizer: is made this encoder's own (padding off, truncation on). batch_tokens: tokens of a batch, padding
        counted; 2048 serves a CPU, an accelerator wants some ten times as many. mesh: the rows of a batch lie over its
        `data` axis (None: the first local device alone)."""
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}: give a positive number")
        if tokenizer.get_vocab_size() > architecture.vocab_size:
            raise ValueError(
                f"the tokenizer of {name} has {tokenizer.get_vocab_size()} tokens, its model "
                f"{architecture.vocab_size}: fetch both from the same place"
            )
        self.name, self.digest, self.settings = name, digest, settings
        self.dims = architecture.embed_dim
        self._params, self._architecture, self._batch_tokens = params, architecture, batch_tokens
        self._mesh = _one_device() if mesh is None else mesh
        tokenizer.no_padding()
        tokenizer.enable_truncation(settings.max_tokens)
        self._tokenizer = tokenizer
        self._end = None if settings.end is None else tokenizer.token_to_id(settings.end)
        if settings.end is not None and self._end is None:
            raise ValueError(f"the tokenizer of {name} has no token {settings.end!r}: fetch it from the model's folder")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
        batch_tokens: int = 2048,
        mesh: Mesh | None = None,
    ) -> "Encoder":
        """Read a Hugging Face or sentence-transformers folder of a BERT or of a decoder that embeds; "minilm" is the
        small model of `make minilm`. Settings that are None are read from the folder or known by its family.

        dtype: float32, or bfloat16 for weights and activations. Raises ValueError in one line for whatever is wrong.
        """
        given = {
            "pooling": pooling,
            "normalize": normalize,
            "query_prefix": query_prefix,
            "passage_prefix": passage_prefix,
            "max_tokens": max_tokens,
        }
        found = read_encoder_folder(path, given)
        architecture = families.read_architecture(found.model, dtype=dtype, param_dtype=dtype)
        if isinstance(architecture, Architecture):
            architecture = dataclasses.replace(architecture, tied=True)  # nothing is decoded: no head is read
        mesh = _one_device() if mesh is None else mesh
        return cls(
            hf.load_parameters(found.model, architecture, mesh=mesh),
            architecture,
            _read_tokenizer(found.model / "tokenizer.json"),
            found.settings,
            name=found.name,
            digest=_digest(found.model, found.settings, dtype),
            batch_tokens=batch_tokens,
            mesh=mesh,
        )

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, D], in the order of the texts, the query prefix before each."""
        return self._encode(texts, self.settings.query_prefix)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, D], in the order of the texts, the passage prefix before each."""
        return self._encode(texts, self.settings.passage_prefix)

    def token_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What the model reads of each text: int32 ids with special tokens, at most max_tokens. No prefix is added."""
        if self.settings.lower_case:
            texts = [text.lower() for text in texts]
        ids = []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            for encoding in self._tokenizer.encode_batch_fast(list(texts[start : start + _TOKENIZED_AT_ONCE])):
                mine = encoding.ids
                if self._end is not None and mine[-1:] != [self._end]:
                    mine = [*mine[: self.settings.max_tokens - 1], self._end]
                ids.append(np.asarray(mine, np.int32))
        return ids

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts[:40]!r}: give a sequence of strings")
        ids = self.token_ids([prefix + text for text in texts])
        vectors = np.empty((len(ids), self.dims), np.float32)
        before: tuple[np.ndarray, jax.Array] | None = None
        for batch in plan([len(mine) for mine in ids], self._batch_tokens, self._mesh.shape[DATA]):
            after = batch.texts, self._run([ids[text] for text in batch.texts], batch)
            # The device works on this batch while the one before is copied.
            if before is not None:
                vectors[before[0]] = np.asarray(before[1])[: len(before[0])]
            before = after
        if before is not None:
            vectors[before[0]] = np.asarray(before[1])[: len(before[0])]
        return vectors

    def _run(self, ids: list[np.ndarray], batch: "Batch") -> jax.Array:
        tokens = np.zeros((batch.num_rows, batch.num_tokens), np.int32)
        lengths = np.zeros(batch.num_rows, np.int32)
        for row, mine in enumerate(ids):
            tokens[row, : len(mine)], lengths[row] = mine, len(mine)
        rows = sharding(self._mesh, ("rows",), lengths.shape)
        with jax.set_mesh(self._mesh):
            return _vectors(
                self._params,
                jax.device_put(tokens, rows),
                jax.device_put(lengths, rows),
                a=self._architecture,
                pooling=self.settings.pooling,
                normalize=self.settings.normalize,
            )


@partial(jax.jit, static_argnames=("a", "pooling", "normalize"))
def _vectors(
    params: Bert | Transformer,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    a: EncoderArchitecture | Architecture,
    pooling: str,
    normalize: bool,
) -> jax.Array:
    """tokens [R, T], lengths [R] -> [R, D] float32; a row without tokens gives zeros."""
    column = jnp.arange(tokens.shape[1])
    segment = (column < lengths[:, None]).astype(jnp.int32)
    # float32 is meant as such: accelerators would otherwise cut the operands of products to fewer bits.
    with jax.default_matmul_precision("highest" if a.dtype == "float32" else "default"):
        vectors = embed(params, a, tokens, segment * column, segment, 2, pooling=pooling, normalize=normalize)
    return vectors[:, 1]


class Batch(NamedTuple):
    """One call of the device: which texts, in how many rows of how many tokens."""

    texts: np.ndarray  # int64 [n], n <= num_rows
    num_rows: int
    num_tokens: int


def padded_length(length: int) -> int:
    """The next length that programs are compiled for: multiples of 16 to 128, then four to each doubling."""
    step = 16
    while length > 8 * step:
        step *= 2
    return max(-(-length // step), 1) * step


def plan(lengths: Sequence[int] | np.ndarray, batch_tokens: int, multiple: int = 1) -> Iterator[Batch]:
    """Batches of texts of similar length, longest first, so that a batch that is too large fails at once.

    Row counts are `multiple` (devices) times 1, 4, 16, ... or what fills batch_tokens: at most half of the rows and
    half of each row are padding (beside short texts' step of 16), and a length has few programs.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    descending = -lengths[order]
    start = 0
    while start < len(order):
        num_tokens = padded_length(-int(descending[start]))
        full = max(batch_tokens // (num_tokens * multiple), 1)
        like = int(np.searchsorted(descending, -(num_tokens // 2), side="left")) - start  # longer than half of it
        # The first text itself may be no longer than half: the shortest length is for all short texts.
        like = len(order) - start if num_tokens == 16 else max(like, 1)
        wanted = min(-(-like // multiple), full)
        counts = [*(4**power for power in range(20) if 4**power < full), full]
        rows = next(count for count in counts if count >= wanted)
        if 2 * wanted < rows:
            rows = max(count for count in counts if count <= wanted)
        taken = min(like, rows * multiple)
        yield Batch(order[start : start + taken], rows * multiple, num_tokens)
        start += taken


def _one_device() -> Mesh:
    return make_mesh(devices=jax.local_devices()[:1])


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise ValueError(
            f"there is no tokenizer.json in {file.parent}: save the tokenizer as a fast one "
            "(save_pretrained of transformers does)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{file} is not a tokenizer ({error}): fetch it again") from None


def _digest(folder: Path, settings: EncoderSettings, dtype: str) -> str:
    """Over what is in the files, not where they lie."""
    whole = hashlib.sha256()
    for file in (folder / families.CONFIG, *hf.weight_files(folder), folder / "tokenizer.json"):
        with open(file, "rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    fields: dict[str, Any] = dataclasses.asdict(settings) | {"dtype": dtype}
    whole.update(json.dumps(fields, sort_keys=True).encode())
    return whole.hexdigest()
