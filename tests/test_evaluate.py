import json

import numpy as np
import pytest

from rlrag.checkpoint import Checkpoints, digest
from rlrag.config import to_dict
from rlrag.data.task import open_task
from rlrag.evaluate import (
    evaluate_checkpoint,
    interval,
    open_evaluation,
    play_script,
    recall,
    row,
    search_recall,
    summarize,
    write_rows,
)
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import read_corpus
from rlrag.train import train
from rlrag.trajectory import Example, Outcome, Passage, SearchRecord, Trajectory
from tests.experiments import tiny
from tests.shared_data import FIXTURES, present, read_json


def played(queries, gold=("a", "b"), scope=None, answer="x", found=()):
    """An episode that asked these queries, one search each."""
    example = Example("q", "which?", ("x", "y"), hops=2, gold=tuple(gold), scope=scope)
    results = [[Passage(id, id, id) for id in found]]
    return Trajectory(example, searches=[SearchRecord((q,), results) for q in queries], outcome=Outcome(answer))


class Ranking:
    """Every query finds its own letters, in their order."""

    def __init__(self):
        self.calls = []

    def search(self, queries, k, scopes=None):
        self.calls.append((list(queries), k))
        return [[Passage(letter, letter, letter) for letter in query][:k] for query in queries]


def test_recall_of_the_searches_at_every_k():
    index = Ranking()
    episodes = [played(["xyza", "zb"]), played(["xyzxyzxyza"]), played(["xyzxyzxyzxa"]), played([])]
    assert search_recall(episodes, index) == [
        {"recall@3": 0.5, "recall@10": 1.0},
        {"recall@3": 0.0, "recall@10": 0.5},
        {"recall@3": 0.0, "recall@10": 0.0},
        {"recall@3": 0.0, "recall@10": 0.0},
    ]
    assert search_recall(episodes[:1], index, (1, 2)) == [{"recall@1": 0.0, "recall@2": 0.5}]


def test_each_query_is_asked_again_once_and_in_calls_of_64():
    index = Ranking()
    search_recall([played([f"q{number}", "same"]) for number in range(100)], index)
    assert [len(queries) for queries, _ in index.calls] == [64, 37]
    assert {k for _, k in index.calls} == {10}


def test_no_recall_without_gold_or_with_a_scope():
    index = Ranking()
    assert search_recall(
        [played(["a"], gold=()), played(["a"], scope="s"), played(["a"], gold=("a",))], index, (1,)
    ) == [
        {},
        {},
        {"recall@1": 1.0},
    ]


def test_the_recall_of_what_the_agent_read():
    assert recall(played(["q"], found=("a", "z"))) == 0.5
    assert recall(played(["q"], gold=())) is None


def test_a_row():
    made = row(played(["q"], answer="The X.", found=("a", "b")))
    assert made | {"status": "completed"} == made
    assert (made["id"], made["question"], made["answers"], made["prediction"]) == ("q", "which?", ["x", "y"], "The X.")
    assert (made["em"], made["f1"], made["searches"], made["tokens"], made["hops"], made["recall"]) == (
        1,
        1,
        1,
        0,
        2,
        1,
    )


def test_a_summary_of_rows():
    rows = [row(played(["q"])) | {"recall@3": 0.5, "recall@10": 1.0}, row(played(["q", "q"], gold=(), answer=None))]
    summary = summarize(rows)
    assert (summary["questions"], summary["em"], summary["answered"], summary["searches"]) == (2, 0.5, 0.5, 1.5)
    assert (summary["recall"], summary["recall@3"], summary["recall@10"]) == (0.0, 0.5, 1.0), "over rows that have it"
    assert (summary["em_hops2"], summary["searches_hops2"], summary["hops"]) == (0.5, 1.5, 2.0)
    assert summary["em_interval"] == interval(np.array([1.0, 0.0]))
    assert "recall@3" not in summarize(rows[1:])


def test_the_interval_of_a_mean():
    low, high = interval(np.array([0.0, 1.0] * 50))
    assert 0.38 < low < 0.42
    assert 0.58 < high < 0.62
    assert interval(np.ones(5)) == [1, 1]


def test_rows_are_written_as_jsonl(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"question": "Łódź?"}, {"question": "x"}])
    assert read_json(tmp_path / "rows.jsonl") == [{"question": "Łódź?"}, {"question": "x"}]
    assert "Łódź" in (tmp_path / "rows.jsonl").read_text()


def test_scripted_policies_frame_a_world():
    task = open_task(tiny())
    rows = play_script(task, task.test, task.bounds["oracle"])
    assert summarize(rows)["em"] == 1
    assert "recall@3" not in rows[0], "a world's questions have a scope"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "run"
    return directory, train(tiny(), directory)


def test_a_checkpoint_plays_the_same_episodes_again(run, monkeypatch):
    directory, result = run
    restored, restore = [], Checkpoints.restore_params
    monkeypatch.setattr(Checkpoints, "restore_params", lambda *args: restored.append(restore(*args)) or restored[0])
    rows = evaluate_checkpoint(directory, tiny().data.test)
    assert rows == read_json(directory / "predictions_final.jsonl")
    assert digest({"policy": restored[0]}) == result["weights_sha256"]


def test_a_checkpoint_plays_other_questions_of_its_world(run):
    rows = evaluate_checkpoint(run[0], "world:multihop?split=test&seed=7&n=5")
    assert len(rows) == 5
    assert rows[0].keys() >= {"id", "question", "answers", "prediction", "em", "f1", "searches", "tokens", "hops"}


@pytest.mark.parametrize("data", [FIXTURES / "hotpotqa.json", FIXTURES / "nq_open.jsonl"])
def test_a_world_cannot_spell_a_real_file(run, data):
    with pytest.raises(
        ValueError, match=r"cannot read .*word '.*' is not in the word-level vocabulary.*configs/multihop"
    ):
        evaluate_checkpoint(run[0], str(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("world:multihop?k=3", "data.train and data.test must be one world"),
        ("world:nowhere", "there is no world named 'nowhere'"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
    ],
)
def test_data_that_do_not_belong_to_the_checkpoint(run, data, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate_checkpoint(run[0], data)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        evaluate_checkpoint(tmp_path, "world:multihop")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny())))
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        evaluate_checkpoint(tmp_path, "world:multihop")


def test_the_experiments_other_questions_stay_as_they_are(tmp_path):
    experiment = tiny()
    task, examples = open_evaluation(experiment, tmp_path, "world:multihop?split=test&seed=7&n=5", None)
    assert len(examples) == len(task.test) == 5
    assert experiment.data.train == tiny().data.train


@pytest.mark.parametrize("path", present("corpus/passages.jsonl.gz"))
def test_recall_of_one_search_with_the_question_equals_the_golden_value(path):
    """bm25s called directly wrote the golden file: 0.7646 at 10 over all questions (share of gold found)."""
    (questions,), (golden,) = present("corpus/questions.jsonl.gz"), present("golden/corpus_bm25_reference.json")
    index = Bm25Index(list(read_corpus(path)))
    episodes = []
    for q in read_json(questions):
        example = Example(q["id"], q["question"], ("x",), gold=tuple(q["gold_ids"]))
        episodes.append(Trajectory(example, searches=[SearchRecord((q["question"],), [[]])]))
    found = np.mean([r["recall@10"] for r in search_recall(episodes, index)])
    assert abs(found - read_json(golden)["recall"]["all"]["recall@10"]) < 1e-4
