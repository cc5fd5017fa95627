import re
from concurrent.futures import ThreadPoolExecutor

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from rlrag.mesh import make_mesh
from rlrag.retrieval import dense
from rlrag.retrieval.dense import DenseSearch

DTYPES = ("float32", "bfloat16", "float16", "int8")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def clustered(rows: int, dims: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around one centre for every 50 rows."""
    centres = normal(max(1, rows // 50), dims, seed=seed + 1)
    found = centres[np.random.default_rng(seed).integers(len(centres), size=rows)] + 0.7 * normal(rows, dims, seed=seed)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def signs(*shape: int, seed: int = 0) -> np.ndarray:
    """-1, 0 and 1: every inner product is exact in every type, and most are equal to many others."""
    return np.random.default_rng(seed).integers(-1, 2, size=shape).astype(np.float32)


def reference(matrix: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ matrix.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(1, 1, jax.devices()[:1])


def test_equals_faiss_and_a_stable_sort(mesh):
    matrix, queries = normal(3001, 37), normal(45, 37, seed=1)
    search = DenseSearch(matrix, mesh, block=1024)
    assert (search.num_rows, search.dims, search.block, search.nbytes) == (3001, 37, 1024, 3072 * 37 * 4)
    index = faiss.IndexFlatIP(37)
    index.add(matrix)
    for k in (1, 3, 10):
        scores, rows = search.search(queries, k)
        assert (scores.dtype, rows.dtype, scores.shape, rows.shape) == (np.float32, np.int32, (45, k), (45, k))
        for expected_scores, expected_rows in (index.search(queries, k), reference(matrix, queries, k)):
            np.testing.assert_array_equal(rows, expected_rows)
            np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "block", "k"), [(1900, 512, 3), (1900, 1024, 16), (700, 128, 60), (129, 4096, 10)]
)
def test_equal_scores_go_to_the_lower_row(mesh, dtype, num_rows, block, k):
    matrix, queries = signs(num_rows, 8), signs(8, 8, seed=1)
    queries[0], queries[1] = 0, 1  # all scores are equal; all of matrix[5] and its like
    scores, rows = DenseSearch(matrix, mesh, dtype=dtype, block=block).search(queries, k)
    expected_scores, expected_rows = reference(matrix, queries, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_equal_rows_far_apart_go_to_the_lower_row(mesh):
    """Inner products that are rounded: a row's score must not depend on where in a block it stands."""
    matrix = normal(500, 24)[np.random.default_rng(2).integers(500, size=5000)]
    _, which = np.unique(matrix, axis=0, return_inverse=True)
    scores, rows = DenseSearch(matrix, mesh, block=2048).search(normal(9, 24, seed=1), 64)
    for query_scores, query_rows in zip(scores, rows):
        copies = which[query_rows]
        assert len(set(copies)) < 20  # of 64
        for copy in set(copies):
            assert len(set(query_scores[copies == copy])) == 1
            found = query_rows[copies == copy]
            np.testing.assert_array_equal(found, np.flatnonzero(which == copy)[: len(found)])


def test_the_best_may_stand_anywhere(mesh):
    """In one group, in the last rows, first or last of all; and padding, whose vectors are 0, wins against no row."""
    rising = np.arange(-2000, 0, dtype=np.float32)[:, None]  # every score is below 0
    search = DenseSearch(rising, mesh, block=512)
    np.testing.assert_array_equal(search.search(np.ones((1, 1)), 20)[1][0], np.arange(1999, 1979, -1))
    search = DenseSearch(rising[::-1], mesh, block=512)
    np.testing.assert_array_equal(search.search(np.ones((1, 1)), 20)[1][0], np.arange(20))


def test_minus_zero_is_zero(mesh):
    matrix = np.array([[-1.0], [-0.0], [0.0], [-0.0], [1e-30]], np.float32)
    for dtype in DTYPES[:2]:
        search = DenseSearch(matrix, mesh, dtype=dtype)
        np.testing.assert_array_equal(
            search.search(np.array([[1.0], [-1.0]]), 5)[1], [[4, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
        )


def test_more_wanted_than_there_are_rows(mesh):
    matrix, queries = normal(5, 3), normal(2, 3, seed=1)
    scores, rows = DenseSearch(matrix, mesh).search(queries, 100)
    np.testing.assert_array_equal(rows, reference(matrix, queries, 100)[1])
    assert np.isfinite(scores).all() and scores.shape == (2, 5)
    assert DenseSearch(matrix[:1], mesh).search(queries, 1)[1].tolist() == [[0], [0]]
    assert [found.shape for found in DenseSearch(matrix, mesh).search(queries[:0], 3)] == [(0, 3), (0, 3)]


def test_more_wanted_than_a_block_holds(mesh):
    matrix, queries = signs(900, 5), signs(2, 5, seed=1)
    np.testing.assert_array_equal(
        DenseSearch(matrix, mesh, block=128).search(queries, 700)[1], reference(matrix, queries, 700)[1]
    )


def bound(matrix: np.ndarray, queries: np.ndarray, dtype: str, compute: str) -> np.ndarray:
    """The bound that DenseSearch states, [Q, N], with a little for float32 sums."""
    x, q = np.abs(matrix.astype(np.float64)), np.abs(queries.astype(np.float64))
    products = q @ x.T
    stored = {
        "float32": 0 * products,
        "float16": 2**-11 * products + 2**-25 * q.sum(1, keepdims=True),
        "bfloat16": 2**-9 * products,
        "int8": q.sum(1, keepdims=True) * x.max(1) / 254,
    }[dtype]
    rounded = {"float32": 0, "bfloat16": 2**-9, "float16": 2**-11}[compute]
    return stored + rounded * (products + stored) + 1e-6 * (products + stored)


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("int8", "float32"),
        ("int8", "bfloat16"),
    ],
)
def test_scores_are_within_the_stated_bound(mesh, dtype, compute):
    matrix, queries = normal(600, 32), normal(8, 32, seed=1)
    matrix[7], matrix[9] = 0, 3e-39  # no scale, and less than the smallest normal number
    search = DenseSearch(matrix, mesh, dtype=dtype, compute=compute)
    scores, rows = search.search(queries, 600)
    exact = queries.astype(np.float64) @ matrix.astype(np.float64).T
    error = np.abs(scores - np.take_along_axis(exact, rows, axis=1))
    assert (error <= np.take_along_axis(bound(matrix, queries, dtype, compute), rows, axis=1) + 1e-36).all()
    assert error.max() > 1e-5  # it is the stored type that is measured
    assert search.nbytes == 640 * {"int8": 32 + 4}.get(dtype, 64)


def test_float16_products_take_any_query(mesh):
    """Queries are brought near 1 by powers of two, which changes no bit of what is found."""
    matrix, queries = normal(300, 16), normal(8, 16, seed=1)
    search = DenseSearch(matrix, mesh, dtype="float16", compute="float16")
    scores, rows = search.search(queries, 4)
    for factor in (2.0**-60, 2.0**30, 2.0**100):
        scaled_scores, scaled_rows = search.search(queries * np.float32(factor), 4)
        np.testing.assert_array_equal(scaled_rows, rows)
        np.testing.assert_array_equal(scaled_scores, scores * np.float32(factor))


@pytest.mark.parametrize(("make", "least"), [(normal, 0.93), (clustered, 0.93)])
def test_int8_finds_nearly_the_same(mesh, make, least):
    matrix, queries = make(4000, 64), make(64, 64, seed=1)
    _, rows = DenseSearch(matrix, mesh, dtype="int8").search(queries, 3)
    _, exact = reference(matrix, queries, 3)
    recall = np.mean([len(set(found) & set(wanted)) / 3 for found, wanted in zip(rows, exact)])
    assert least <= recall < 1


def test_the_corpus_is_read_in_slices(mesh, monkeypatch, tmp_path):
    np.save(tmp_path / "matrix.npy", normal(1000, 16).astype(np.float16))
    stored = np.load(tmp_path / "matrix.npy", mmap_mode="r")

    class Recorded:
        ndim, shape, dtype, reads = 2, stored.shape, stored.dtype, []

        def __getitem__(self, rows):
            self.reads.append(len(stored[rows]))
            return stored[rows]

    monkeypatch.setattr(dense, "_SLICE_BYTES", 300 * 16 * 4)
    queries = normal(8, 16, seed=1)
    for dtype in DTYPES:
        sliced, rows = DenseSearch(Recorded(), mesh, dtype=dtype, block=256).search(queries, 5)
        assert max(Recorded.reads) == 300
        with monkeypatch.context() as at_once:
            at_once.setattr(dense, "_SLICE_BYTES", 2**30)
            whole, whole_rows = DenseSearch(np.asarray(stored), mesh, dtype=dtype, block=256).search(queries, 5)
        np.testing.assert_array_equal(rows, whole_rows)
        np.testing.assert_array_equal(sliced, whole)
    broken = np.array(stored)
    broken[777, 3] = np.inf
    with pytest.raises(ValueError, match="corpus row 777 "):
        DenseSearch(broken, mesh)


def test_few_programs_are_compiled(mesh):
    matrix = signs(300, 4)
    search = DenseSearch(matrix, mesh)
    for count in (1, 2, 5, 8, 9, 31, 33, 64, 100, 129, 530, 1100):
        queries = signs(count, 4, seed=count)
        for k in (1, 3, 4):
            np.testing.assert_array_equal(search.search(queries, k)[1], reference(matrix, queries, k)[1])
    assert search._program._cache_size() == len(dense.BATCHES)


def test_a_batch_is_padded_little_and_cut_seldom():
    def sizes(count: int, spare: int) -> list[int]:
        return [len(padded) for _, padded in dense._cut(np.zeros((count, 2), np.float32), spare)]

    assert [sizes(n, 32) for n in (0, 1, 2, 9, 33, 100, 1030)] == [
        [], [1], [8], [32], [32, 1], [128], [512, 512, 8]
    ]  # fmt: skip
    assert [sizes(n, 384) for n in (33, 129, 513)] == [[128], [512], [512, 1]]


def test_many_threads_at_once(mesh):
    matrix, queries = normal(500, 8), normal(40, 8, seed=1)
    search = DenseSearch(matrix, mesh)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: search.search(queries[row : row + 1], 3)[1][0], range(40)))
    np.testing.assert_array_equal(found, reference(matrix, queries, 3)[1])


def one_line(match: str):
    return pytest.raises(ValueError, match=rf"\A.*{match}.*\Z")  # a dot is no newline


def test_a_wrong_corpus_is_told(mesh):
    good = normal(10, 4)
    for bad in (np.nan, np.inf, -np.inf, 1e300):
        matrix = good.astype(np.float64)
        matrix[6, 2] = bad
        for dtype in DTYPES:
            with one_line("corpus row 6 has a number that is not finite: drop or repair it"):
                DenseSearch(matrix, mesh, dtype=dtype)
    with one_line("corpus row, as float16, 3 has a number that is not finite"):
        DenseSearch(good + 1e5 * (np.arange(10) == 3)[:, None], mesh, dtype="float16")
    for matrix, shape in ((good[0], r"\(4,\)"), (good[:0], r"\(0, 4\)"), (good[:, :0], r"\(10, 0\)"), ([[1.0]], "")):
        with one_line(rf"the corpus has shape {shape}.*give a matrix \[rows, dims\]"):
            DenseSearch(matrix, mesh)
    with one_line("the corpus is of type complex64: give real numbers"):
        DenseSearch(good.astype(np.complex64), mesh)
    with one_line("dtype is 'int4': choose one of float32, bfloat16, float16, int8"):
        DenseSearch(good, mesh, dtype="int4")
    with one_line("block is 0: give at least 1 row"):
        DenseSearch(good, mesh, block=0)
    with one_line("use rlrag.mesh.make_mesh"):
        DenseSearch(good, jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1]))


def test_a_wrong_query_is_told(mesh):
    search, queries = DenseSearch(normal(10, 4), mesh), normal(3, 4, seed=1)
    for bad in (np.nan, np.inf, 1e300):
        with one_line("query 2 has a number that is not finite"):
            search.search(np.where(np.arange(12).reshape(3, 4) == 9, bad, queries.astype(np.float64)), 3)
    for wrong in (queries[0], queries[:, :3], queries[None]):
        with one_line(r"queries have shape .*: give \[queries, 4\], as the corpus has dims"):
            search.search(wrong, 3)
    with one_line("k is 0: ask for at least 1 row"):
        search.search(queries, 0)
    with one_line("query 1 is so large that its scores may not fit float32: scale it down"):
        search.search(queries * np.array([[1], [1e38], [1]], np.float32), 3)


def print_rows() -> None:
    """Rows found by meshes of 8 devices, and what travels between them."""
    matrix, queries = normal(2003, 20), normal(9, 20, seed=1)
    ties, tied = signs(2003, 6), signs(9, 6, seed=1)
    for shape in ((8, 1), (4, 2)):
        mesh = make_mesh(*shape)
        search = DenseSearch(matrix, mesh, block=128)
        assert search.nbytes == 256 * 20 * 4
        print(search.search(queries, 5)[1].tolist())
        print(DenseSearch(ties, mesh, dtype="int8", block=128).search(tied, 40)[1].tolist())
    print(DenseSearch(matrix[:3], make_mesh(8, 1)).search(queries, 5)[1].tolist())  # devices without a row
    program = search._program.lower(search._matrix, None, jnp.zeros((32, 20)), 8).compile().as_text()
    for shape, operation in re.findall(r"= (\S+?)(?:\{.*?\})? ((?:all|reduce|collective|ragged)-[\w-]+)\(", program):
        print(operation, shape)


def test_devices_find_the_same_and_only_winners_travel(mesh, run_on_devices):
    lines = run_on_devices(print_rows).splitlines()
    matrix, queries = normal(2003, 20), normal(9, 20, seed=1)
    alone = DenseSearch(matrix, mesh, block=128).search(queries, 5)[1].tolist()
    tied = reference(signs(2003, 6), signs(9, 6, seed=1), 40)[1].tolist()
    assert [parsed(line) for line in lines[:5]] == [
        alone, tied, alone, tied, reference(matrix[:3], queries, 3)[1].tolist()
    ]  # fmt: skip
    assert sorted(lines[5:]) == ["all-gather f32[32,64]", "all-gather s32[32,64]"]


def parsed(line: str) -> list[list[int]]:
    return [[int(row) for row in part.split(",")] for part in line.strip("[]").split("], [")]
