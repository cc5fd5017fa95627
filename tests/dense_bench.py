"""Dense search, exact and approximate, timed in turn: python -m tests.dense_bench  (make dense-bench)

100,000 unit vectors of 384 dimensions around 2,000 centres, and queries near some of them; one search at a time over a
batch of queries, every arm in every round. Recall@10 is against exact NumPy in float64. `jax` is DenseSearch of
rlrag/retrieval/dense.py on the devices of this process, the others are faiss, as launch.build_index makes them.
"""

import argparse
import datetime
import json
import platform
import time
from typing import Any

import jax
import numpy as np

from rlrag.retrieval.dense import DenseSearch
from rlrag.retrieval.vectors import ON_DEVICE, STORAGES, Find, Shape, build_vectors, set_search

K = 10


def clustered(rng: np.random.Generator, rows: int, dims: int, centres: np.ndarray) -> np.ndarray:
    """Unit vectors whose cosine with their centre is about 0.7, as passages of one subject have."""
    found = centres[rng.integers(len(centres), size=rows)] + rng.standard_normal((rows, dims), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def exact(matrix: np.ndarray, queries: np.ndarray) -> np.ndarray:
    scores = queries.astype(np.float64) @ matrix.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


def searching(index: Any, shape: Shape) -> Find:
    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        set_search(index, shape)
        return index.search(queries, k)

    return find


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="file for the figures, as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, arguments.rows // 50), arguments.dims), np.float32)
    matrix = clustered(rng, arguments.rows, arguments.dims, centres)
    queries = clustered(rng, arguments.queries, arguments.dims, centres)
    wanted = exact(matrix, queries)
    shapes = {f"faiss flat {storage}": Shape("flat", storage) for storage in STORAGES}
    shapes |= {f"faiss ivf, {probes} probes": Shape("ivf", probes=probes) for probes in (4, 16, 64)}
    shapes |= {f"faiss hnsw, effort {effort}": Shape("hnsw", effort=effort) for effort in (32, 64, 256)}
    shapes |= {
        f"faiss pq, {parts} bytes": Shape("pq", parts=parts) for parts in (arguments.dims // 4, arguments.dims // 2)
    }
    arms = {}
    built = {}  # searched in several ways
    for name, shape in shapes.items():
        key = shape.resolve(len(matrix), arguments.dims).factory
        if key not in built:
            begin = time.perf_counter()
            built[key] = (build_vectors(matrix, shape), time.perf_counter() - begin)
            print(f"{key}: built in {built[key][1]:.1f} s", flush=True)
        arms[name] = (searching(built[key][0], shape), built[key][1])
    for dtype in ON_DEVICE:
        begin = time.perf_counter()
        arms[f"jax flat {dtype}"] = (DenseSearch(matrix, dtype=dtype).search, time.perf_counter() - begin)
    machine = f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    print(f"{machine}, {datetime.date.today()}, {arguments.rows} x {arguments.dims}, medians of {arguments.rounds}")
    figures = {name: {"build_s": round(seconds, 2)} for name, (_, seconds) in arms.items()}
    for batch in (1, 64, 512):
        parts = [queries[start : start + batch] for start in range(0, min(len(queries), 20 * batch), batch)]
        times = {name: [] for name in arms}
        for round_number in range(arguments.rounds + 1):  # the first warms up
            for name, (find, _) in arms.items():
                begin = time.perf_counter()
                found = [find(part, K)[1] for part in parts]
                if round_number:
                    times[name].append((time.perf_counter() - begin) / sum(map(len, parts)))
                elif batch == 512:
                    rows = np.concatenate(found)
                    hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), wanted.tolist(), strict=True)]
                    figures[name][f"recall@{K}"] = sum(hits) / (K * len(queries))
        for name, taken in times.items():
            figures[name][f"queries_per_s_{batch}"] = round(1 / float(np.median(taken)), 1)
    print(f"{'':24} {'build s':>8} {'recall@10':>10} {'q/s, 1':>10} {'q/s, 64':>10} {'q/s, 512':>10}")
    for name, row in figures.items():
        rates = " ".join(f"{row[f'queries_per_s_{batch}']:>10,.0f}" for batch in (1, 64, 512))
        print(f"{name:24} {row['build_s']:>8.1f} {row[f'recall@{K}']:>10.4f} {rates}")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
