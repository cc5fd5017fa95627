"""Build an index: python -m launch.build_index --corpus=passages.jsonl.gz --kind=bm25 --out=runs/index

The same command goes on with a build that was stopped. --encoder: of dense kinds, a Hugging Face directory, `minilm`
(make minilm installs it) or module:function. What is built is served by launch.serve_retrieval, or read by a training
with --config.retriever.kind=index --config.retriever.index=DIR.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch.flags import run

NUMBERS = (
    ("lists", 0, "Of ivf: centroids; 0: by the number of passages."),
    ("probes", 16, "Of ivf: lists that a search reads."),
    ("links", 32, "Of hnsw: edges a node."),
    ("effort", 64, "Of hnsw: candidates of a search."),
    ("parts", 0, "Of pq: bytes a vector, a divisor of its dimensions; 0: a quarter of them."),
)


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("corpus", None, "JSONL of {id, contents} or {id, title, text}.", flag_values=values)
    flags.DEFINE_string("out", None, "Directory of the index.", flag_values=values)
    flags.DEFINE_string("kind", "bm25", "bm25, flat, ivf, hnsw, pq or milvus.", flag_values=values)
    flags.DEFINE_string("index_type", "", "Of milvus: FLAT, IVF_FLAT or HNSW.", flag_values=values)
    flags.DEFINE_string("encoder", "", "What turns passages into vectors.", flag_values=values)
    flags.DEFINE_float("k1", 1.2, "Of bm25: how fast repeated words stop counting.", flag_values=values)
    flags.DEFINE_float("b", 0.75, "Of bm25: how much long passages are held back.", flag_values=values)
    flags.DEFINE_string("storage", "fp32", "Of vectors, how they are kept: fp32, fp16, int8.", flag_values=values)
    for name, default, text in NUMBERS:
        flags.DEFINE_integer(name, default, text, flag_values=values)


def main(values: flags.FlagValues) -> None:
    from rlrag.console import say
    from rlrag.retrieval.directory import Plan, build
    from rlrag.retrieval.vectors import KINDS, Shape

    corpus = Path(values.corpus)
    if not corpus.is_file():
        raise ValueError(f"corpus is {values.corpus!r}, which is no file: give --corpus=FILE, JSONL of passages")
    if values.kind == "milvus":
        fill(corpus, values, say)
        return
    numbers = {name: getattr(values, name) for name, _, _ in NUMBERS}
    shape = Shape(values.kind, values.storage, **numbers) if values.kind in KINDS else Shape()
    plan = Plan(values.kind, values.encoder, shape, values.k1, values.b)
    manifest = build(corpus, Path(values.out), plan, Told(say))
    size = sum(manifest["files"].values())
    say(f"{values.out}: {manifest['kind']}, {manifest['count']:,} passages, {size / 2**20:,.1f} MiB")


def fill(corpus: Path, values: flags.FlagValues, say) -> None:
    """A collection of Milvus: --out is URI/COLLECTION."""
    from rlrag.retrieval.corpus import read_corpus
    from rlrag.retrieval.directory import open_encoder
    from rlrag.retrieval.milvus import fill_milvus

    uri, _, collection = values.out.rpartition("/")
    if not uri or not values.encoder:
        raise ValueError(f"--out is {values.out!r}: give URI/COLLECTION, as passages.db/wiki, and --encoder=minilm")
    told = Told(say)
    manifest = fill_milvus(
        read_corpus(corpus), open_encoder(values.encoder), uri, collection, index_type=values.index_type or None,
        progress=lambda read, written: told("read", read, 0),
    )  # fmt: skip
    say(f"{values.out}: milvus, {manifest['count']:,} passages")


class Told:
    """Progress, a line every few seconds, with the speed since the first."""

    EVERY_S = 5.0

    def __init__(self, say):
        self.say, self.what, self.next = say, "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.since, self.next = what, (now, done), now + self.EVERY_S
        if now < self.next and done != total:
            return
        self.next = now + self.EVERY_S
        begin, first = self.since
        rate = f", {(done - first) / (now - begin):,.0f} a second" if now > begin and done > first else ""
        self.say(f"{what} {done:,}{f' of {total:,}' if total else ''} passages{rate}")


if __name__ == "__main__":
    run(
        main,
        define_flags,
        required={"corpus": "passages.jsonl.gz", "out": "runs/index"},
        doc=__doc__,
        interrupted="interrupted: the same command goes on from here",
    )
