"""The real-input loop end to end, on a small corpus of our own."""

import json

import pytest

from configs import multihop
from rlrag.config import check
from rlrag.evaluate import evaluate_checkpoint
from rlrag.train import train
from tests.films import write_films
from tests.shared_data import FIXTURES, present, read_json


def smoke(folder):
    """The smoke variant on the films."""
    questions, passages = write_films(folder)
    experiment = multihop.get_config("smoke")
    for part in ("train", "validation", "test"):
        spec = getattr(experiment.data, part)
        assert spec.startswith(multihop.QUESTIONS)
        setattr(experiment.data, part, spec.replace(multihop.QUESTIONS, str(questions)))
    experiment.retriever.corpus = str(passages)
    return experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multihop")
    return folder / "run", train(smoke(folder), folder / "run"), folder / "questions.jsonl"


def test_the_whole_loop_runs(run):
    directory, result, _ = run
    rows = read_json(directory / "metrics.jsonl")
    assert [row["stage"] for row in rows] == ["warm_up"] * 3 + ["main"] * 2
    assert result["final"]["questions"] == result["warm_start"]["questions"] == 4
    assert result["oracle"]["recall@10"] == 1
    assert result["oracle"]["em"] == 1
    assert result["random"]["em"] == 0
    assert (directory / "tokenizer" / "tokenizer.json").is_file()


def test_predictions_tell_the_recall_of_their_searches(run):
    directory, result, _ = run
    rows = read_json(directory / "predictions_final.jsonl")
    assert [row["id"] for row in rows] == [f"film-{number}" for number in (10, 8, 9, 11)]
    assert all(0 <= row["recall@3"] <= row["recall@10"] <= 1 for row in rows)
    assert {"recall@3", "recall@10", "em", "f1"} <= set(result["final"])


def test_its_checkpoint_answers_any_file(run):
    directory, _, questions = run
    rows = evaluate_checkpoint(directory, f"{questions}?split=dev")
    assert [row["id"] for row in rows] == ["film-8", "film-9", "film-10", "film-11"]
    stored = {row["id"]: row for row in read_json(directory / "predictions_final.jsonl")}
    assert all(row == stored[row["id"]] for row in rows), "the same weights and tokenizer give the same predictions"
    (row,) = evaluate_checkpoint(directory, str(FIXTURES / "musique.jsonl"))
    assert row.keys() >= {"id", "question", "answers", "prediction", "em", "f1", "searches", "tokens", "hops"}
    assert evaluate_checkpoint(directory, str(FIXTURES / "nq_open.jsonl"), "nq_open")[0].get("recall@3") is None


def test_its_own_tokenizer_goes_before_a_changed_corpus(run):
    directory, _, questions = run
    corpus = questions.with_name("passages.jsonl")
    text = corpus.read_text()
    before = evaluate_checkpoint(directory, f"{questions}?split=dev&n=1")
    corpus.write_text(text + json.dumps({"id": "new", "title": "zzz", "text": "qqq " * 400}) + "\n")
    try:
        assert evaluate_checkpoint(directory, f"{questions}?split=dev&n=1") == before
    finally:
        corpus.write_text(text)


def test_a_world_is_not_for_a_checkpoint_of_text(run):
    with pytest.raises(ValueError, match="not on a world: give a file, not 'world:multihop'"):
        evaluate_checkpoint(run[0], "world:multihop")


@pytest.mark.parametrize("variant", multihop.VARIANTS)
def test_every_variant_is_whole(variant):
    experiment = multihop.get_config(variant)
    check(experiment)
    assert experiment.agent.max_tokens <= min(s.update.row_tokens for s in (experiment.warm_up, experiment.main))
    assert "split=dev" not in experiment.data.train + experiment.data.validation, "dev is for the report alone"
    assert "split=dev" in experiment.data.test


def test_an_unknown_variant():
    told = r"configs/multihop\.py has no variant 'faiss'; there are: bm25, dense, published, smoke"
    with pytest.raises(ValueError, match=told):
        multihop.get_config("faiss")


def test_absent_data_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"passages.jsonl.gz', which is no file \(seen from .*--config.retriever.corpus"
    ):
        train(multihop.get_config("smoke"), tmp_path / "run")


@pytest.mark.parametrize("path", present("corpus/questions.jsonl.gz"))
def test_train_and_validation_share_no_question_and_test_is_dev(path):
    from rlrag.data.selection import open_file

    data = multihop.get_config().data
    specs = (spec.replace(multihop.QUESTIONS, str(path)) for spec in (data.train, data.validation, data.test))
    train_part, validation, test = ([example.id for example in open_file(spec)] for spec in specs)
    assert not set(train_part) & set(validation)
    assert not {*train_part, *validation} & set(test)
    assert (len(train_part), len(validation), len(test)) == (636, 64, 300)
