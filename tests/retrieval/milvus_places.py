"""Where the tests of Milvus run, and what they fill it with.

The real Milvus only: milvus-lite in this process, and a server where RLRAG_TEST_MILVUS names one (with MILVUS_TOKEN).
Where the packages of the extra are not installed there is no place, and what is left is the error that says so.
"""

import hashlib
import importlib.util
import os
import uuid

import numpy as np
import pytest

from rlrag.retrieval.milvus import MilvusIndex, fill_milvus
from rlrag.trajectory import Passage

INSTALLED = all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite"))
SERVER = os.environ.get("RLRAG_TEST_MILVUS", "")
PLACES = [*(["file"] if INSTALLED else []), *(["server"] if SERVER else [])]
on_milvus = pytest.mark.parametrize("place", PLACES, indirect=True)
on_file = pytest.mark.parametrize("place", PLACES[:1], indirect=True)
on_server = pytest.mark.parametrize("place", PLACES[1:], indirect=True)


class Words:
    """An encoder that sums a vector drawn for each word; `encoded` counts passages."""

    def __init__(self, dims=32, name="words"):
        self.dims, self.name, self.digest, self.encoded = dims, name, f"{name}-{dims}", 0

    def encode_queries(self, texts):
        return np.stack([self._encode(text) for text in texts])

    def encode_passages(self, texts):
        self.encoded += len(texts)
        return self.encode_queries(texts)

    def _encode(self, text):
        total = np.full(self.dims, 1e-3, np.float32)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
            total += np.random.default_rng(seed).normal(size=self.dims).astype(np.float32)
        return (total / np.linalg.norm(total)).astype(np.float32)


def corpus(count, words=5):
    rng = np.random.default_rng(count)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 60, words)) for _ in range(count)]
    return [Passage(f"p{row}", f"Title {row % 7}", text) for row, text in enumerate(texts)]


class Place:
    def __init__(self, uri):
        self.uri, self.collection = uri, f"test_{uuid.uuid4().hex}"

    def fill(self, passages, encoder, **options):
        return fill_milvus(passages, encoder, self.uri, self.collection, **options)

    def open(self, encoder, **options):
        return MilvusIndex(encoder, self.uri, self.collection, consistency="Strong", **options)
