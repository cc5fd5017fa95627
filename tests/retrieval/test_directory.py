import json

import numpy as np
import pytest

from rlrag.retrieval import corpus, directory
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.directory import MANIFEST, Plan, build, open_directory, open_encoder, open_index, read_manifest
from rlrag.retrieval.vectors import Shape
from rlrag.trajectory import Passage
from tests.retrieval.encoders import Hashing
from tests.shared_data import FIXTURES

TITLED = FIXTURES / "corpus_titled.jsonl"
HASHING = "tests.retrieval.encoders:hashing"


@pytest.fixture
def many(tmp_path):
    """A corpus of 700 passages of a few words each."""
    rng = np.random.default_rng(0)
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for row in range(700):
            words = " ".join(f"w{word}" for word in rng.integers(0, 200, 6))
            file.write(json.dumps({"id": f"p{row}", "title": f"t{row}", "text": words}) + "\n")
    return path


QUERIES = ["w1 w2 w3", "t5", "w7", "nothing at all"]


def test_bm25_from_disk_is_bm25_in_memory(tmp_path, many):
    said = []
    manifest = build(many, tmp_path / "out", Plan("bm25"), lambda *progress: said.append(progress))
    assert (manifest["kind"], manifest["count"], manifest["corpus"]["name"]) == ("bm25", 700, "many.jsonl")
    assert said[-1] == ("indexed", 700, 700) and said[0][:2] == ("read", 700)
    assert open_index(str(tmp_path / "out"), verify=True).search(QUERIES, 5) == Bm25Index.from_jsonl(many).search(
        QUERIES, 5
    )
    assert open_index(f"bm25:{many}").search(QUERIES, 5) == Bm25Index.from_jsonl(many).search(QUERIES, 5)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq"])
def test_dense_kinds(tmp_path, many, kind):
    manifest = build(many, tmp_path / "out", Plan(kind, HASHING, Shape(kind)))
    assert manifest["dims"] == 32 and manifest["encoder"]["name"] == "hashing" and manifest["shape"]["kind"] == kind
    assert not (tmp_path / "out" / directory.EMBEDDINGS).exists()
    found = open_index(str(tmp_path / "out")).search(QUERIES[:2], 3)
    if kind == "flat":
        encoder, passages = Hashing(), list(corpus.read_corpus(many))
        vectors = encoder.encode_passages([f"{p.title} {p.text}" for p in passages])
        scores = encoder.encode_queries(QUERIES[:2]) @ vectors.T
        for row, answer in zip(scores, found, strict=True):
            assert [p.id for p in answer] == [passages[i].id for i in np.argsort(-row, kind="stable")[:3]]
    assert all(len(answer) == 3 for answer in found)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", range(1, 12))
@pytest.mark.parametrize("kind", ["bm25", "flat"])
def test_a_build_that_was_stopped_goes_on(tmp_path, many, monkeypatch, kind, after):
    """Stopped at any of its steps, and once more at the next: what comes out is the same, and nothing is done twice."""
    monkeypatch.setattr(corpus, "FLUSH_EVERY", 200)
    monkeypatch.setattr(directory, "AT_ONCE", 150)
    monkeypatch.setattr("rlrag.retrieval.bm25.CHUNK", 150)
    encoder = Hashing()
    monkeypatch.setattr(directory, "open_encoder", lambda source: encoder)
    plan = Plan("bm25") if kind == "bm25" else Plan(kind, HASHING)
    whole = build(many, tmp_path / "whole", plan)
    encoder.encoded, left = 0, after

    def stop(*progress):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped

    for _ in range(2):
        try:
            build(many, tmp_path / "out", plan, stop)
        except Stopped:
            with pytest.raises(ValueError, match=r"is no index .unfinished: the same build command goes on"):
                open_directory(tmp_path / "out")
        else:
            break
        left = 3
    if not (tmp_path / "out" / MANIFEST).exists():
        build(many, tmp_path / "out", plan)
    assert encoder.encoded <= (0 if kind == "bm25" else 700 + 2 * 150)
    manifest = read_manifest(tmp_path / "out")
    assert manifest | {"seconds": 0} == whole | {"seconds": 0}
    for name in whole["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_does_not_fit_is_told(tmp_path, many):
    out = tmp_path / "out"
    build(many, out, Plan("flat", HASHING))
    with pytest.raises(ValueError, match="holds a finished index: choose another --out"):
        build(many, out, Plan("flat", HASHING))
    with pytest.raises(
        ValueError, match=r"was built with the encoder hashing \(.*\), this is hashing \(.*another space"
    ):
        open_index(str(out), encoder="tests.retrieval.encoders:salted")
    manifest = json.loads((out / MANIFEST).read_text())
    for change, message in (
        ({"format": 9}, "an index of format 9, this reads 1"),
        ({"count": 9}, "holds 700 passages where the manifest says 9"),
        ({"files": {"passages.jsonl": 5}}, r"passages.jsonl has \d+ bytes where the manifest says 5"),
        ({"files": {"gone": 5}}, "gone is missing where the manifest says 5"),
    ):
        (out / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            open_index(str(out))
    (out / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is no JSON"):
        open_index(str(out))
    (out / MANIFEST).write_text(json.dumps(manifest))
    stored = out / corpus.PASSAGES
    stored.write_bytes(stored.read_bytes().replace(b"w1 ", b"w2 "))
    open_index(str(out))
    with pytest.raises(ValueError, match=r"passages.jsonl is not what the manifest says \(SHA-256\)"):
        open_index(str(out), verify=True)


def test_another_plan_or_corpus_does_not_mix(tmp_path, many):
    def stop(*progress):
        raise Stopped

    with pytest.raises(Stopped):
        build(many, tmp_path / "out", Plan("bm25"), stop)
    with pytest.raises(ValueError, match="begun with another plan: choose another --out"):
        build(many, tmp_path / "out", Plan("bm25", k1=0.9))
    with pytest.raises(ValueError, match="begun with another corpus"):
        build(TITLED, tmp_path / "out", Plan("bm25"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty and holds no index"):
        build(many, tmp_path / "full", Plan("bm25"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl holds no passages"):
        build(tmp_path / "empty.jsonl", tmp_path / "none", Plan("bm25"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lsh",), "kind is 'lsh': choose bm25, flat"),
        (("flat",), "kind flat needs an encoder: give --encoder=minilm"),
        (("bm25", HASHING), "kind bm25 has no encoder"),
        (("bm25", "", Shape(), -1.0), "BM25 k1 is -1.0"),
    ],
)
def test_wrong_plans_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)


def test_an_encoder_that_gives_nonsense_is_told(tmp_path, many, monkeypatch):
    class Broken(Hashing):
        def encode_passages(self, texts):
            return np.full((len(texts), self.dims), np.nan, np.float32)

    monkeypatch.setattr(directory, "open_encoder", lambda source: Broken())
    with pytest.raises(ValueError, match=r"the encoder hashing gave \(700, 32\) for 700 passages of 32"):
        build(many, tmp_path / "out", Plan("flat", HASHING))


def test_fused_and_reranked_from_disk(tmp_path, many):
    build(many, tmp_path / "words", Plan("bm25"))
    build(many, tmp_path / "dense", Plan("flat", HASHING))
    both = f"{tmp_path / 'words'},{tmp_path / 'dense'}"
    words, dense = open_index(str(tmp_path / "words")), open_index(str(tmp_path / "dense"))
    found = open_index(both, depth=50).search(["w1 w2"], 5)[0]
    ranks = [{p.id: rank for rank, p in enumerate(i.search(["w1 w2"], 50)[0], 1)} for i in (words, dense)]
    best = found[0]
    assert best.score == pytest.approx(sum(1 / (60 + rank[best.id]) for rank in ranks if best.id in rank))
    short = open_index(both, rerank="tests.retrieval.encoders:shortest").search(["w1 w2"], 3)[0]
    assert [len(p.text) for p in short] == sorted(len(p.text) for p in short)
    by_encoder = open_index(str(tmp_path / "words"), encoder=HASHING, rerank="encoder", depth=700)
    assert [p.id for p in by_encoder.search(["w1 w2"], 1)[0]] == [
        max(
            words.search(["w1 w2"], 700)[0],
            key=lambda p: float(
                Hashing().encode_queries(["w1 w2"])[0] @ Hashing().encode_passages([f"{p.title} {p.text}"])[0]
            ),
        ).id
    ]
    for source, options, message in (
        ("", {}, "index is empty"),
        ("bm25:nowhere", {}, "nowhere is no file"),
        (str(tmp_path / "nothing"), {}, r"is no index \(none there\)"),
        (both, {"rerank": "encoder"}, "rerank is 'encoder': say which with encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            open_index(source, **options)


def test_encoders_by_name():
    assert open_encoder(HASHING).dims == 32
    with pytest.raises(ValueError, match=r"encoder is 'tests.retrieval.encoders:none', which cannot be loaded"):
        open_encoder("tests.retrieval.encoders:none")
    assert Passage("a", "", "")


def test_flat_indexes_on_the_devices(tmp_path, many):
    for kind in ("flat", "ivf"):
        build(many, tmp_path / kind, Plan(kind, HASHING, Shape(kind)))
    build(many, tmp_path / "words", Plan("bm25"))
    for source in (str(tmp_path / "flat"), f"{tmp_path / 'words'},{tmp_path / 'flat'}"):
        expected = open_index(source).search(QUERIES[:3], 4)
        for row, wanted in zip(open_index(source, on_device="float32").search(QUERIES[:3], 4), expected, strict=True):
            assert [p.id for p in row] == [p.id for p in wanted]
            np.testing.assert_allclose([p.score for p in row], [p.score for p in wanted], atol=1e-6)
    with pytest.raises(ValueError, match=r"on_device is 'int8', and .*ivf has no flat index to search there"):
        open_index(str(tmp_path / "ivf"), on_device="int8")
    with pytest.raises(ValueError, match="on_device is 'int4': choose float32, bfloat16, float16, int8"):
        open_index(str(tmp_path / "flat"), on_device="int4")
