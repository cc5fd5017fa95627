"""A deterministic encoder of no quality: words hashed to random directions."""

import hashlib
from collections.abc import Sequence

import numpy as np


class Hashing:
    def __init__(self, dims: int = 32, salt: str = ""):
        self.dims, self.salt = dims, salt
        self.name, self.digest = "hashing", hashlib.sha256(f"{dims} {salt}".encode()).hexdigest()
        self.encoded = 0

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._vector(text) for text in texts]) if texts else np.zeros((0, self.dims), np.float32)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += len(texts)
        return self.encode_queries(texts)

    def _vector(self, text: str) -> np.ndarray:
        total = np.full(self.dims, 1e-3)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.blake2b((self.salt + word).encode(), digest_size=8).digest())
            total += np.random.default_rng(seed).standard_normal(self.dims)
        return (total / np.linalg.norm(total)).astype(np.float32)


def hashing() -> Hashing:
    return Hashing()


def salted() -> Hashing:
    return Hashing(salt="other")


def shortest(query: str, passages) -> list[float]:
    """A reranking function: short texts first."""
    return [-len(passage.text) for passage in passages]
