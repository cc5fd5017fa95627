"""The retrieval server under load: python -m tests.retrieval_load  (make retrieval-load)

The server has one core, clients the other. Bodies of 64 queries against what the library reaches in process on one
core with the same batches, in turn; then many clients of one query each, every request of which must be answered by
200, or by 429 and then 200. Memory of the server is watched meanwhile.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rlrag.retrieval.remote import HttpIndex
from rlrag.retrieval.spawn import SpawnedServer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpus"
BATCH, K, DIMS, AT_ONCE = 64, 3, 384, 4
VECTORS = "RLRAG_LOAD_VECTORS"


class Lookup:
    """An encoder of random vectors that costs nothing, so that searching is what is measured."""

    name, digest, dims = "lookup", "lookup", DIMS

    def __init__(self):
        self.table = np.load(os.environ[VECTORS], mmap_mode="r")

    def encode_queries(self, texts):
        return np.stack([self.table[int(text.rsplit(" ", 1)[1]) % len(self.table)] for text in texts])

    encode_passages = encode_queries


def lookup():
    return Lookup()


def synthetic(directory: Path) -> tuple[Path, list[str]]:
    rng = np.random.default_rng(0)
    path = directory / "passages.jsonl"
    words = np.minimum(rng.zipf(1.3, (17_000, 100)), 30_000)
    with open(path, "w") as file:
        for row, own in enumerate(words):
            file.write(json.dumps({"id": str(row), "title": f"t{row}", "text": " ".join(f"w{w}" for w in own)}) + "\n")
    return path, [" ".join(f"w{w}" for w in own[:12]) for own in words[:4000]]


def corpus(directory: Path) -> tuple[Path, list[str]]:
    from tests.shared_data import read_json

    path = DATA / "passages.jsonl.gz"
    if not path.is_file():
        return synthetic(directory)
    return path, [row["question"] for row in read_json(DATA / "questions.jsonl.gz")]


def numbered(queries: list[str], count: int) -> list[str]:
    """As many queries, all different: each ends with a number, which is also the row of its vector."""
    return [f"{queries[i % len(queries)]} {i}" for i in range(count)]


def pinned(core: int, pid: int = 0) -> None:
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir(f"/proc/{pid or 'self'}/task"):
            os.sched_setaffinity(int(thread), {core})


def in_process(kind: str, directory: Path, queries: list[str]) -> float:
    """Queries a second of the library alone, in this process, on one core."""
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    if kind == "bm25":
        import bm25s

        from rlrag.retrieval.bm25 import _import_bm25s

        _import_bm25s()
        index = bm25s.BM25.load(directory, mmap=True, show_progress=False)
        options = dict(token_pattern=r"(?u)\b\w+\b", stopwords=None, show_progress=False)
        begin = time.perf_counter()
        for batch in batches:
            tokens = bm25s.tokenize(batch, return_ids=False, **options)
            index.retrieve(tokens, k=K, show_progress=False, n_threads=0)
    else:
        from rlrag.retrieval.vectors import Shape, import_faiss, read_vectors

        import_faiss().omp_set_num_threads(1)
        index, encoder = read_vectors(directory / "vectors.faiss", Shape()), lookup()
        begin = time.perf_counter()
        for batch in batches:
            index.search(encoder.encode_queries(batch), K)
    return len(queries) / (time.perf_counter() - begin)


async def posted(url: str, bodies: list[tuple[int, bytes]], at_once: int) -> list[float]:
    """Send all bodies, so many at once; the latency of each in seconds."""
    import aiohttp

    waiting, latencies = iter(bodies), []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:

        async def client() -> None:
            for _, body in waiting:
                begin = time.perf_counter()
                async with session.post(f"{url}/retrieve", data=body) as reply:
                    found = await reply.read()
                    assert reply.status == 200, found
                latencies.append(time.perf_counter() - begin)

        await asyncio.gather(*(client() for _ in range(at_once)))
    return latencies


def through_server(url: str, queries: list[str]) -> float:
    from rlrag.retrieval.wire import build_requests

    bodies = build_requests("search_r1", queries, K, None, BATCH)
    begin = time.perf_counter()
    asyncio.run(posted(url, bodies, AT_ONCE))
    return len(queries) / (time.perf_counter() - begin)


async def crowd(url: str, queries: list[str], clients: int, seconds: float, memory) -> dict:
    """So many clients, one query after the other each. 429 is waited out as the server asks, and counted."""
    import aiohttp

    end, number = time.monotonic() + seconds, iter(range(10**9))
    latencies, statuses, lost, sizes = [], {}, [], []

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while time.monotonic() < end:
                asked = next(number)
                body = json.dumps({"queries": [f"{queries[asked % len(queries)]} {asked}"], "topk": K}).encode()
                begin = time.perf_counter()
                while True:
                    try:
                        async with session.post(f"{url}/retrieve", data=body) as reply:
                            found = await reply.json()
                            status = reply.status
                    except aiohttp.ClientError as error:
                        lost.append(repr(error))
                        break
                    statuses[status] = statuses.get(status, 0) + 1
                    if status == 429:
                        await asyncio.sleep(float(reply.headers["Retry-After"]) * (0.5 + asked % 100 / 100))
                        continue
                    if status != 200 or len(found["result"][0]) != K:
                        lost.append((status, found))
                    break
                latencies.append(time.perf_counter() - begin)

        async def watch() -> None:
            while time.monotonic() < end:
                sizes.append(memory())
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(client() for _ in range(clients)))
    p50, p99 = np.percentile(latencies, [50, 99])
    third = sizes[len(sizes) // 3 :]
    return {
        "clients": clients, "seconds": seconds, "requests": len(latencies), "statuses": statuses, "lost": len(lost),
        "requests_per_s": round(len(latencies) / seconds, 1), "p50_ms": round(1e3 * p50, 1),
        "p99_ms": round(1e3 * p99, 1), "memory_mib": [round(third[0] / 2**20, 1), round(third[-1] / 2**20, 1)],
        "first_lost": lost[:1],
    }  # fmt: skip


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=64 * 150)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60)
    f = parser.parse_args()
    print(f"# {datetime.date.today()}  {platform.processor() or platform.machine()}  python -m tests.retrieval_load")
    with tempfile.TemporaryDirectory() as folder:
        from rlrag.retrieval.directory import Plan, build
        from rlrag.retrieval.vectors import build_vectors, write_vectors

        directory = Path(folder)
        path, questions = corpus(directory)
        rows = np.random.default_rng(1).standard_normal((20_000, DIMS)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(directory / "vectors.npy", rows)
        os.environ[VECTORS] = str(directory / "vectors.npy")
        queries = numbered(questions, min(f.queries, len(rows)))
        manifest = build(path, directory / "bm25", Plan("bm25"))
        dense(directory, manifest, rows, build_vectors, write_vectors)
        pinned(1)
        for kind in ("bm25", "flat"):
            server = start(directory / kind, directory / f"{kind}.log")
            try:
                alone, served = [], []
                through_server(server.url, queries[: 10 * BATCH])
                for _ in range(f.rounds):
                    alone.append(in_process(kind, directory / kind, queries))
                    served.append(through_server(server.url, queries))
                a, s = float(np.median(alone)), float(np.median(served))
                ratios = [b / c for b, c in zip(served, alone)]
                told = f"served {s:,.0f} queries/s, in process {a:,.0f}, ratio {np.median(ratios):.3f}"
                print(
                    f"{kind}, bodies of {BATCH}: {told} ({', '.join(f'{ratio:.3f}' for ratio in ratios)})", flush=True
                )
                pid = server._process.pid
                found = asyncio.run(crowd(server.url, questions, f.clients, f.seconds, lambda pid=pid: resident(pid)))
                print(f"{kind}, {json.dumps(found)}", flush=True)
                if found["lost"]:
                    sys.exit(f"{found['lost']} requests were lost")
            finally:
                server.stop()


def dense(directory: Path, manifest: dict, rows: np.ndarray, build_vectors, write_vectors) -> None:
    """The same passages with the vectors of the table."""
    from rlrag.retrieval.vectors import Shape

    out = directory / "flat"
    out.mkdir()
    for name in ("passages.jsonl", "passages.offsets"):
        (out / name).write_bytes((directory / "bm25" / name).read_bytes())
    count = manifest["count"]
    write_vectors(build_vectors(np.resize(rows, (count, DIMS)), Shape()), out / "vectors.faiss")
    manifest = manifest | {
        "kind": "flat", "dims": DIMS, "shape": vars(Shape()),
        "encoder": {"name": "lookup", "source": "tests.retrieval_load:lookup", "digest": "lookup"},
        "files": {path.name: path.stat().st_size for path in out.iterdir()},
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest))


def start(index: Path, log: Path) -> SpawnedServer:
    server = SpawnedServer([f"--index={index}", "--cache_size=0", "--max_waiting=4096"], log)
    HttpIndex([server.url]).wait_ready(60)
    pinned(0, server._process.pid)
    return server


if __name__ == "__main__":
    main()
