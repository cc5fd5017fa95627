import hashlib
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from rlrag.retrieval.client import CachedRetriever, SearchUnavailable
from rlrag.retrieval.milvus import MilvusIndex, fill_milvus
from rlrag.trajectory import Passage
from tests.conftest import REPOSITORY
from tests.retrieval.milvus_places import Words, corpus, on_file, on_milvus


def by_faiss(encoder, passages, queries, k):
    """The answers of an exact search that knows nothing of Milvus."""
    index = faiss.IndexFlatIP(encoder.dims)
    index.add(encoder.encode_queries([f"{p.title} {p.text}" for p in passages]))
    scores, rows = index.search(encoder.encode_queries(queries), min(k, len(passages)))
    return [[(passages[r].id, s) for r, s in zip(*found)] for found in zip(rows.tolist(), scores.tolist())]


def check_equal(answers, expected):
    """Equal scores at every rank, and equal ids, up to the order of scores that rounding may swap."""
    assert [len(found) for found in answers] == [len(found) for found in expected]
    for found, wanted in zip(answers, expected):
        np.testing.assert_allclose([p.score for p in found], [score for _, score in wanted], atol=1e-6)
        for (rank, passage), (id, score) in zip(enumerate(found), wanted):
            near = [other for other, close in wanted if abs(close - score) < 1e-6]
            assert passage.id == id or passage.id in near or rank == len(found) - 1


@on_milvus
def test_answers_are_those_of_an_exact_search(place):
    encoder, passages = Words(), corpus(300)
    manifest = place.fill(iter(passages), encoder, batch_size=64)
    rows = "".join(f'{{"id": "{p.id}", "title": "{p.title}", "text": "{p.text}"}}\n' for p in passages)
    assert manifest == {
        "format": 1,
        "encoder": {"name": "words", "digest": "words-32"},
        "dims": 32,
        "scoped": False,
        "index": {"type": "FLAT", "parameters": {}},
        "count": 300,
        "corpus": hashlib.sha256(rows.encode()).hexdigest(),
    }
    index = place.open(encoder)
    assert (len(index), index.manifest) == (300, manifest)
    queries = [" ".join(p.text.split()[:3]) for p in passages[:40]]
    for k in (1, 5, 300, 1000):
        check_equal(index.search(queries, k), by_faiss(encoder, passages, queries, k))
    (found,) = index.search([f"{passages[7].title} {passages[7].text}"], 1)
    assert [replace(p, score=None) for p in found] == [passages[7]]
    assert found[0].score == pytest.approx(1)
    assert index.search([], 3) == []
    retriever = CachedRetriever(index, deadline_s=30)
    assert retriever.search(queries[:3], 4) == index.search(queries[:3], 4)
    index.close()
    index.close()
    with pytest.raises(SearchUnavailable, match="was closed"):
        index.search(["w1"], 1)


@on_milvus
def test_equal_scores_go_by_id(place):
    encoder = Words()
    same = [Passage(f"s{number:02}", "", "one and the same") for number in range(50)]
    shuffled = [same[row] for row in np.random.default_rng(0).permutation(50)]
    place.fill([*shuffled[:25], *corpus(20), *shuffled[25:]], encoder, batch_size=16)
    index = place.open(encoder)
    for k in (1, 3, 49, 50):
        (found,) = index.search(["one and the same"], k)
        assert [p.id for p in found] == [p.id for p in same[:k]]
    index.close()


HOSTILE = (
    "plain",
    "q\"uo'te",
    "back\\slash",
    '\\"',
    '" or id != "',
    'x" or scope like "%',
    "line\n\r\tend",
    "é😀\u2028",
    "\x01",
)


@on_milvus
def test_scopes_cannot_be_left(place):
    encoder, passages = Words(), corpus(120)
    scope_of = {p.id: scope for p, scope in zip(passages, itertools.cycle((*HOSTILE, None)))}
    place.fill(passages, encoder, scope=lambda passage: scope_of[passage.id])
    index = place.open(encoder)
    for scope in HOSTILE:
        inside = [p for p in passages if scope_of[p.id] == scope]
        check_equal(index.search(["w1 w2"], 100, [scope]), by_faiss(encoder, inside, ["w1 w2"], 100))
    mixed = [None, "plain", HOSTILE[1], "plain"]
    together = index.search(["w3", "w4", "w5", "w6"], 4, mixed)
    for query, scope, found in zip(["w3", "w4", "w5", "w6"], mixed, together):
        assert [p.id for p in found] == [p.id for p in index.search([query], 4, [scope])[0]]
    assert len(index.search(["w1"], 500)[0]) == 120
    for unknown in ('" or 1 == 1 or scope == "', "%", "", "plain\\", 'plain"', "\ud800", "x" * 70_000):
        with pytest.raises(ValueError, match=r"no passage of the scope|a scope is ''|is not UTF-8|has 70000 bytes"):
            index.search(["w1"], 3, [unknown])
    index.close()
    with pytest.raises(ValueError, match="has scopes, and none are given: fill with anew=True"):
        place.fill(passages, encoder)


KILLED = """
import os, signal, sys
from rlrag.retrieval.milvus import fill_milvus
from tests.retrieval.milvus_places import Words, corpus
place, batches = sys.argv[1:3], int(sys.argv[3])
class Mortal(Words):
    def encode_passages(self, texts):
        if self.encoded >= 32 * batches:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_passages(texts)
fill_milvus(corpus(200), Mortal(), *place, batch_size=32)
"""


@on_milvus
def test_a_killed_fill_goes_on_and_loses_and_doubles_nothing(place):
    passages = corpus(200)
    for batches in (0, 3):
        arguments = [sys.executable, "-c", KILLED, place.uri, place.collection, str(batches)]
        done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        with pytest.raises(ValueError, match="is not filled to its end: run fill_milvus again, it goes on"):
            place.open(Words())
    encoder, seen = Words(), []
    manifest = place.fill(passages, encoder, batch_size=50, progress=lambda *counts: seen.append(counts))
    assert encoder.encoded == 200 - 96
    assert seen == [(50, 0), (100, 4), (150, 54), (200, 104)]
    assert manifest["count"] == 200
    index = place.open(encoder)
    assert sorted(p.id for p in index.search(["w1"], 1000)[0]) == sorted(p.id for p in passages)
    index.close()


@on_milvus
def test_another_fill_writes_what_changed(place):
    encoder, passages = Words(), corpus(60)
    first = place.fill(passages, encoder, batch_size=25)
    assert place.fill(passages, encoder) == first
    assert encoder.encoded == 60
    changed = [*passages[:30], Passage("p30", "New", "other words"), *passages[31:], Passage("p60", "", "more")]
    assert place.fill(changed, encoder)["count"] == 61
    assert encoder.encoded == 62
    index = place.open(encoder)
    assert [p.id for p in index.search(["New other words"], 1)[0]] == ["p30"]
    index.close()
    with pytest.raises(ValueError, match="holds 11 rows of passages that are not among these 50: fill with anew=True"):
        place.fill(changed[:50], encoder)
    assert place.fill(changed[:50], encoder, anew=True)["count"] == 50
    with pytest.raises(ValueError, match="has no scopes, and some are given"):
        place.fill(changed[:50], encoder, scope=lambda passage: "s")


@on_milvus
def test_an_index_of_another_type_is_built_without_encoding(place):
    encoder, passages = Words(), corpus(200)
    place.fill(passages, encoder)
    queries = [p.text for p in passages[:20]]
    exact = by_faiss(encoder, passages, queries, 5)
    for kind, parameters, looked in (("HNSW", {"M": 16}, {"ef": 100}), ("IVF_FLAT", {"nlist": 4}, {"nprobe": 4})):
        manifest = place.fill(passages, encoder, index_type=kind, index_parameters=parameters)
        assert manifest["index"]["type"] == kind
        assert manifest["index"]["parameters"].items() >= parameters.items()
        index = place.open(encoder, parameters=looked)
        found = index.search(queries, 5)
        index.close()
        hits = sum(len({p.id for p in f} & {id for id, _ in e}) for f, e in zip(found, exact))
        assert hits >= 95
        assert place.fill(passages, encoder) == manifest  # stays what it was
    assert encoder.encoded == 200


@on_milvus
def test_many_threads(place):
    encoder, passages = Words(), corpus(150)
    place.fill(passages, encoder, scope=lambda passage: passage.title)
    index = place.open(encoder, timeout_s=60)
    requests = [([p.text], 3, [p.title if row % 2 else None]) for row, p in enumerate(passages[:60])]
    alone = [index.search(*request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: index.search(*request), requests * 2))
    for found, expected in zip(together, alone * 2):
        assert [p.id for p in found[0]] == [p.id for p in expected[0]]
    stop, told = threading.Event(), []

    def go_on():
        while not stop.is_set():
            try:
                index.search(["w1"], 1)
            except SearchUnavailable as error:
                told.append(error.reason)
                return

    threads = [threading.Thread(target=go_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    index.close()
    for thread in threads:
        thread.join(10)
    stop.set()
    assert len(told) == 8  # every one was told, none got stuck or another error
    assert not any("\n" in reason for reason in told)


@on_milvus
def test_collections_that_do_not_fit_the_encoder(place):
    encoder = Words()
    passages = corpus(10)
    place.fill(passages, encoder)
    with pytest.raises(ValueError, match=r"holds vectors of 32 dimensions and words gives 16: use words, or fill"):
        place.open(Words(16))
    for act in (lambda: place.open(Words(name="other")), lambda: place.fill(passages, Words(name="other"))):
        with pytest.raises(ValueError, match="was filled with the encoder words words-32, not other other-32"):
            act()
    with pytest.raises(ValueError, match=r"collection 'nothing' at .* is not there: fill it first"):
        MilvusIndex(encoder, place.uri, "nothing")
    index = place.open(encoder)
    with pytest.raises(ValueError, match="has no scopes, and 'here' is asked for"):
        index.search(["w1"], 1, ["here"])
    with pytest.raises(ValueError, match="the string 'w1'"):
        index.search("w1", 1)
    with pytest.raises(ValueError, match="k is 0"):
        index.search(["w1"], 0)
    with pytest.raises(ValueError, match="k is 16385"):
        index.search(["w1"], 16385)
    with pytest.raises(ValueError, match="1 scopes for 2 queries"):
        index.search(["w1", "w2"], 1, [None])
    index._encoder = type("Long", (Words,), {"encode_queries": lambda self, texts: np.ones((len(texts), 32))})()
    with pytest.raises(ValueError, match=r"words gave a vector of length 5\.65685: normalise"):
        index.search(["w1"], 1)
    index.close()


@on_milvus
def test_passages_at_milvus_s_limits(place):
    encoder = Words()
    longest = Passage("é" * 32_767, "t" * 65_535, "x" * 65_535)
    odd = Passage('a"b\\c\n', "", "")
    place.fill([longest, odd], encoder)
    place.fill([longest, odd], encoder)
    index = place.open(encoder)
    assert {replace(p, score=None) for p in index.search(["w"], 9)[0]} == {longest, odd}
    index.close()
    with pytest.raises(ValueError, match="passages 1 and 3 of the corpus have the same id"):
        place.fill([Passage("a", "", "1"), Passage("b", "", "2"), Passage("a", "", "3")], encoder, batch_size=2)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "holds no passages"),
        ([Passage("", "", "no id at all")], r"a passage has no id \(its text begins 'no id at all'\)"),
        ([Passage("a", "", "1"), Passage("a", "", "2")], "the id 'a' comes twice: give each passage its own"),
        ([Passage("i" * 65_536, "", "")], "the passage 'i+': its id has 65536 bytes, Milvus holds 65535"),
        ([Passage("a", "é" * 32_768, "")], "the passage 'a': its title has 65536 bytes"),
        ([Passage("a", "", "x" * 65_536)], "the passage 'a': its text has 65536 bytes"),
        ([Passage("a", "", "\ud800")], "the passage 'a': its text is not UTF-8"),
    ],
)
def test_passages_that_milvus_cannot_hold(tmp_path, passages, message):
    """Told before anything is opened, where the first batch shows it."""
    with pytest.raises(ValueError, match=message) as error:
        fill_milvus(passages, Words(), str(tmp_path / "x.db"), "wiki")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_wrong_options(tmp_path):
    uri, passages = str(tmp_path / "x.db"), corpus(2)
    with pytest.raises(ValueError, match="index_type is 'flat': choose FLAT, IVF_FLAT, HNSW"):
        fill_milvus(passages, Words(), uri, "wiki", index_type="flat")
    with pytest.raises(ValueError, match="without an index_type"):
        fill_milvus(passages, Words(), uri, "wiki", index_parameters={"M": 8})
    with pytest.raises(ValueError, match="batch_size is 0"):
        fill_milvus(passages, Words(), uri, "wiki", batch_size=0)
    with pytest.raises(ValueError, match="words has 1 dimensions: Milvus holds vectors of 2 to 32768"):
        fill_milvus(passages, Words(1), uri, "wiki")
    with pytest.raises(ValueError, match="the passage 'p0' has an empty scope"):
        fill_milvus(passages, Words(), uri, "wiki", scope=lambda passage: "")
    with pytest.raises(ValueError, match="uri is 'localhost:19530': give http://host:19530, or the path"):
        MilvusIndex(Words(), "localhost:19530", "wiki")
    with pytest.raises(ValueError, match="holds a password: put user:password into MILVUS_TOKEN") as told:
        MilvusIndex(Words(), "http://root:secret@host:19530", "wiki")
    assert "secret" not in str(told.value)
    with pytest.raises(ValueError, match="is not there: fill it first"):
        MilvusIndex(Words(), uri, "wiki")
    with pytest.raises(ValueError, match="consistency is 'strong': choose Strong"):
        MilvusIndex(Words(), uri, "wiki", consistency="strong")
    assert not list(tmp_path.iterdir())


@on_file
def test_the_guide_s_python_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (REPOSITORY / "docs" / "guides" / "milvus.md").read_text()
    Path("passages.jsonl").write_text('{"id": "a", "title": "Ada", "text": "An engineer."}\n')
    names = {"encoder": Words()}
    for block in re.findall(r"```py\n(.*?)```", guide, re.DOTALL):
        exec(compile(block.replace("http://host:19530", place.uri), "guide", "exec"), names)
    assert names["found"][0][0].id == "a"
