import math
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rlrag.retrieval import bm25
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import read_corpus, store
from tests.shared_data import FIXTURES, present, read_json

TITLED = FIXTURES / "corpus_titled.jsonl"


def test_scores_are_lucene_bm25():
    """Against the formula itself: idf ln(1 + (N - n + .5)/(n + .5)), tf / (tf + k1 (1 - b + b length/mean))."""
    passages = list(read_corpus(TITLED))
    k1, b = 0.9, 0.4
    documents = [Counter(re.findall(r"\w+", f"{p.title} {p.text}".lower())) for p in passages]
    mean = sum(document.total() for document in documents) / len(documents)
    query = ["ada", "bridge", "ada"]  # a word asked twice counts twice

    def score(document):
        total = 0.0
        for word in query:
            n = sum(word in other for other in documents)
            tf = document[word]
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * document.total() / mean))
        return total

    expected = {p.id: score(d) for p, d in zip(passages, documents) if score(d) > 0}
    (found,) = Bm25Index(passages, k1=k1, b=b).search(["Ada BRIDGE, ada?"], 10)
    assert {p.id: p.score for p in found} == pytest.approx(expected, rel=1e-5)
    assert [p.id for p in found] == sorted(expected, key=lambda id: -expected[id])


def test_search_edges():
    index = Bm25Index.from_jsonl(TITLED)
    assert len(index) == 5
    nothing, twins, one = index.search(["zebra ???", "BELLS", "harbour ada"], 100)  # k beyond the corpus
    assert nothing == []  # no known word: nothing was found
    assert [p.id for p in twins] == ["c", "d"]  # equal scores: corpus order
    assert twins[0].score == twins[1].score
    assert [p.id for p in one] == ["b", "a"]  # passages that share no word do not fill up to k
    assert [p.id for p in index.search(["bells"], 1)[0]] == ["c"]
    assert [p.id for p in index.search(["bells"], 4)[0]] == ["c", "d"]  # k within the corpus, fewer found
    assert index.search(["", " "], 3) == [[], []]
    assert index.search([], 3) == []


def test_user_errors_name_the_value():
    index = Bm25Index.from_jsonl(TITLED)
    assert index.search(["ada"], 1, [None]) == index.search(["ada"], 1)
    with pytest.raises(ValueError, match="no scope 'q7'"):
        index.search(["ada", "marn"], 1, [None, "q7"])
    with pytest.raises(ValueError, match="1 scopes for 2 queries"):
        index.search(["ada", "marn"], 1, [None])
    with pytest.raises(ValueError, match="k is 0"):
        index.search(["ada"], 0)
    with pytest.raises(ValueError, match="the string 'ada'"):
        index.search("ada", 1)
    with pytest.raises(ValueError, match=r"k1 is -1 and b is 0\.5"):
        Bm25Index(list(read_corpus(TITLED)), k1=-1, b=0.5)


def test_a_built_index_finds_the_same(tmp_path, monkeypatch):
    """In several chunks of words, for many threads, with what one that was killed had left."""
    monkeypatch.setattr(bm25, "CHUNK", 2)
    index = Bm25Index.from_jsonl(TITLED)
    queries = ["Ada Holt", "bells", "bridge engineer", "zebra"]
    assert list(store(read_corpus(TITLED), tmp_path)) == [5]
    building = Bm25Index.build(tmp_path)
    assert [next(building), next(building)] == [2, 4]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("words-*.npz")}
    assert len(kept) == 2
    building.close()
    (tmp_path / "words-000000000002.npz").unlink()
    assert list(Bm25Index.build(tmp_path)) == [2, 4, 5]
    assert not list(tmp_path.glob("words-*"))
    loaded = Bm25Index.load(tmp_path)
    assert len(loaded) == 5
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: loaded.search(queries, 3), range(40)))
    assert results == [index.search(queries, 3)] * 40
    with pytest.raises(ValueError, match=r"holds no BM25 tables \(params.index.json is missing\)"):
        Bm25Index.load(tmp_path / "elsewhere")


def test_jax_is_never_started():
    """bm25s runs a JAX program when it is imported beside JAX; a search server must not."""
    script = (
        "import sys, rlrag.retrieval.bm25 as i, rlrag.retrieval.client\n"
        "assert 'bm25s' not in sys.modules\n"
        f"assert i.Bm25Index.from_jsonl({str(TITLED)!r}).search(['ada'], 1)\n"
        "assert 'jax' not in sys.modules and 'jax.lax' not in sys.modules\n"
        "import jax.lax\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def by_hand():
    """Ranks: q1 b a; q2 c d, equal; q3 none."""
    questions = [
        {"id": "q1", "dataset": "x", "question": "Ada Holt, engineer", "gold_ids": ["b", "a"]},
        {"id": "q2", "dataset": "x", "question": "bells", "gold_ids": ["d"]},
        {"id": "q3", "dataset": "y", "question": "zebra", "gold_ids": ["a"]},
    ]
    later = {f"recall@{k}": 2 / 3 for k in (2, 5, 10, 20, 100)}
    return TITLED, questions, {"recall": {"all": {"n": 3, "recall@1": 1 / 6} | later}, "top10": {}}


def pooled():
    (path,) = present("corpus/passages.jsonl.gz")
    (questions,), (golden,) = present("corpus/questions.jsonl.gz"), present("golden/corpus_bm25_reference.json")
    return path, read_json(questions), read_json(golden)


@pytest.mark.parametrize("source", [by_hand, *([pooled] if present("corpus", "golden") else [])])
def test_ranks_and_recall_equal_bm25s_called_directly(source):
    """Exactly, where equal scores go by corpus order; the stored run left them to chance, so up to their order."""
    path, questions, golden = source()
    index = Bm25Index.from_jsonl(path)
    found = dict(zip((q["id"] for q in questions), index.search([q["question"] for q in questions], 100)))

    import bm25s

    rows = read_json(path)
    options = dict(token_pattern=r"(?u)\b\w+\b", stopwords=None, stemmer=None, show_progress=False)
    direct = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    direct.index(bm25s.tokenize([row["title"] + " " + row["text"] for row in rows], **options), show_progress=False)
    words = bm25s.tokenize([q["question"] for q in questions], return_ids=False, **options)
    for question, query in zip(questions, words):
        scores = direct.get_scores(query)
        best = [i for i in np.argsort(-scores, kind="stable")[:100] if scores[i] > 0]
        assert [(p.id, p.score) for p in found[question["id"]]] == [(rows[i]["id"], scores[i]) for i in best]

    for id, stored in golden["top10"].items():
        ours = [(p.id, round(p.score or 0.0, 4)) for p in found[id][:10]]
        assert [score for _, score in ours] == [score for _, score in stored]
        last = stored[-1][1]
        assert {pair for pair in ours if pair[1] > last} == {tuple(pair) for pair in stored if pair[1] > last}

    for dataset, stored in golden["recall"].items():
        chosen = [q for q in questions if dataset in ("all", q["dataset"])]
        assert len(chosen) == stored["n"]
        for k in (1, 2, 5, 10, 20, 100):
            worst, best = np.mean([_recall_bounds(q["gold_ids"], found[q["id"]], k) for q in chosen], 0)
            assert worst - 5e-5 <= stored[f"recall@{k}"] <= best + 5e-5
            recall = np.mean(
                [len(set(q["gold_ids"]) & {p.id for p in found[q["id"]][:k]}) / len(q["gold_ids"]) for q in chosen]
            )
            assert abs(recall - stored[f"recall@{k}"]) <= (5.1e-5 if k > 1 else 1 / len(chosen) + 5e-5)
            assert best - worst <= max(0.02, 1.1 / len(chosen))  # so the bounds say something


def _recall_bounds(gold, passages, k):
    """Recall at k if equal scores at the cut fell against, and for, the gold passages."""
    if not passages:
        return 0.0, 0.0
    bar = passages[min(k, len(passages)) - 1].score
    sure = [p.id for p in passages if p.score > bar]
    tied = [p.id for p in passages if p.score == bar]
    room = min(k, len(passages)) - len(sure)
    certain = len(set(gold) & set(sure))
    wanted = len(set(gold) & set(tied))
    return (certain + max(0, room - (len(tied) - wanted))) / len(gold), (certain + min(room, wanted)) / len(gold)
