import numpy as np
import pytest

from rlrag.retrieval.vectors import KINDS, Shape, VectorIndex, build_vectors, read_vectors, write_vectors
from rlrag.trajectory import Passage
from tests.retrieval.encoders import Hashing


def unit(count, dims, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact(queries, rows, k):
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), wanted.tolist())])


# Of what each kind finds of the true ten best; random vectors are the hardest there are.
LEAST = {("flat", "fp32"): 1.0, ("flat", "fp16"): 0.99, ("flat", "int8"): 0.95, ("ivf", "fp32"): 0.6,
         ("hnsw", "fp32"): 0.9, ("pq", "fp32"): 0.3}  # fmt: skip


@pytest.mark.parametrize(("kind", "storage"), LEAST)
def test_every_kind_finds_and_survives_the_disk(tmp_path, kind, storage):
    rows, queries = unit(2000, 32), unit(20, 32, seed=1)
    shape = Shape(kind=kind, storage=storage, effort=128).resolve(*rows.shape)
    index = build_vectors(rows, shape)
    wanted = exact(queries, rows, 10)
    _, found = index.search(queries, 10)
    assert recall(found, wanted) >= LEAST[kind, storage]
    if (kind, storage) == ("flat", "fp32"):
        np.testing.assert_array_equal(found, wanted)
    write_vectors(index, tmp_path / "v.faiss")
    scores, again = read_vectors(tmp_path / "v.faiss", shape).search(queries, 10)
    np.testing.assert_array_equal(again, found)
    if storage == "fp32" and kind != "pq":
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows.T, again, 1), atol=1e-5)


def test_a_file_that_is_no_index_is_told(tmp_path):
    (tmp_path / "v.faiss").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"v.faiss is no faiss index \(.*\): build it again"):
        read_vectors(tmp_path / "v.faiss", Shape())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lsh"}, "kind is 'lsh': choose flat, ivf, hnsw, pq"),
        ({"storage": "fp8"}, "storage is 'fp8': choose fp32, fp16, int8"),
        ({"probes": 0}, "probes is 0: give at least 1"),
        ({"kind": "pq", "parts": 5}, "parts is 5, which does not divide the 32 dimensions"),
        ({"kind": "pq"}, "kind pq learns 256 codes and there are 100 vectors: choose flat"),
    ],
)
def test_wrong_shapes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Shape(**options).resolve(100, 32)


def test_shapes_choose_their_numbers():
    assert set(KINDS) == {"flat", "ivf", "hnsw", "pq"}
    assert Shape("ivf").resolve(100_000, 384).factory == "IVF1264,Flat"
    assert Shape("ivf", "int8", lists=7).resolve(100, 8).factory == "IVF7,SQ8"
    assert Shape("ivf").resolve(20, 8).factory == "IVF1,Flat"
    assert Shape("pq").resolve(1000, 384).factory == "PQ96x8"
    assert Shape("hnsw", "fp16", links=16).resolve(10, 8).factory == "HNSW16,SQfp16"


def test_passages_come_with_their_scores_equal_ones_in_corpus_order():
    encoder = Hashing()
    texts = ["red fox", "blue fish", "red fox", "green bird", "red fox"]
    passages = [Passage(str(row), "", text) for row, text in enumerate(texts)]
    vectors = encoder.encode_passages(texts)
    index = VectorIndex(build_vectors(vectors, Shape()).search, passages, encoder)
    (found,) = index.search(["red fox"], 4)
    assert [p.id for p in found][:3] == ["0", "2", "4"]
    np.testing.assert_allclose([p.score for p in found][:3], 1.0, atol=1e-5)
    assert [len(found) for found in index.search(["red fox", "bird"], 9)] == [5, 5]  # no more than there are
    assert index.search([], 3) == [] and len(index) == 5
    with pytest.raises(ValueError, match="no scope 's'"):
        index.search(["red"], 1, ["s"])
