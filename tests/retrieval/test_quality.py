import gzip
import json

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from rlrag.retrieval.quality import mean, measure, parse, read_judgments, read_queries, search_all
from tests.retrieval.serving import Echo
from tests.shared_data import present, read_json

# Ours, and trec_eval's name for it.
NAMES = {
    "recall@5": "recall_5", "recall@20": "recall_20", "precision@5": "P_5", "ndcg@3": "ndcg_cut_3",
    "ndcg@10": "ndcg_cut_10", "map@10": "map_cut_10", "mrr@1000": "recip_rank", "map@1000": "map",
}  # fmt: skip
GOLDEN = [path for name in ("scifact_mini", "tools") for path in present(f"golden/ir_{name}_run.json.gz")]

IDS = st.sampled_from([f"d{i}" for i in range(12)])
RUNS = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3"]),
    st.dictionaries(IDS, st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.25]), max_size=12),
    min_size=1,
)
JUDGMENTS = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3"]), st.dictionaries(IDS, st.integers(-1, 3), min_size=1), min_size=1
)


@given(RUNS, JUDGMENTS)
def test_the_measures_are_trec_eval_s(run, judgments):
    """Graded and negative relevance, ties, queries without a run."""
    run = {query: found for query, found in run.items() if found}
    ours = measure(run, judgments, list(NAMES))
    theirs = pytrec_eval.RelevanceEvaluator(judgments, set(NAMES.values())).evaluate(run)
    for query, values in theirs.items():
        if query in ours:
            assert {name: ours[query][name] for name in NAMES} == pytest.approx(
                {name: values[other] for name, other in NAMES.items()}
            )
    for query in ours.keys() - theirs.keys():
        assert not any(ours[query].values())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_runs(path):
    stored = read_json(path)
    golden = read_json(path.with_name(path.name.replace("_run.json.gz", "_expected.json")))
    ours = measure(stored["run"], stored["qrels"], [*NAMES, "completeness@10"])
    assert len(ours) == golden["n_queries"]
    means = mean(ours)
    for name, other in NAMES.items():
        if other in golden["mean"]:
            assert means[name] == pytest.approx(golden["mean"][other], abs=1e-9)
    assert means["completeness@10"] == pytest.approx(golden["toolret_trec_eval"]["Comprehensiveness@10"], abs=1e-5)


def test_by_hand():
    judgments = {"q": {"a": 1, "b": 1}}
    values = measure({"q": {"x": 3.0, "a": 2.0, "b": 1.0}}, judgments, ["recall@2", "mrr@1", "mrr@2", "completeness@3"])
    assert values == {"q": {"recall@2": 0.5, "mrr@1": 0.0, "mrr@2": 0.5, "completeness@3": 1.0}}
    assert measure({}, judgments, ["recall@2"]) == {"q": {"recall@2": 0.0}}
    with pytest.raises(ValueError, match="no query has a relevant passage"):
        mean(measure({}, {"q": {"a": 0}}, ["recall@2"]))
    for wrong in ("bleu@4", "ndcg", "ndcg@0", "ndcg@x"):
        with pytest.raises(ValueError, match=f"measure is '{wrong}': give one of recall"):
            parse(wrong)


def test_the_run_of_an_index_keeps_its_order():
    run = search_all(Echo(), {str(n): f"query {n}" for n in range(100)}, 3)
    assert run["7"] == {"query 7#0": 3.0, "query 7#1": 2.0, "query 7#2": 1.0} and len(run) == 100


def test_files(tmp_path):
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_bytes(gzip.compress(b'{"_id": "1", "text": "a"}\n{"id": 2, "question": "b"}\n'))
    qrels.write_text("query-id\tcorpus-id\tscore\n1\tx\t1\n1\ty\t0\n2\tx\t2\n")
    assert read_queries(queries) == {"1": "a", "2": "b"}
    assert read_judgments(qrels) == {"1": {"x": 1, "y": 0}, "2": {"x": 2}}
    qrels.write_text("1 0 x 1\n")
    assert read_judgments(qrels) == {"1": {"x": 1}}
    qrels.write_text("1 0 x 1\n1 x much\n")
    with pytest.raises(ValueError, match=r"qrels.tsv, line 2: '1 x much': give query-id"):
        read_judgments(qrels)
    for line in ("{", "[]", '{"_id": "1"}', json.dumps({"text": "a"})):
        queries.write_text(line)
        with pytest.raises(ValueError, match=r"queries.jsonl, line 1: give an object with _id and text"):
            read_queries(queries)
