import pytest

from rlrag.agents.tags import Tags
from rlrag.config import Agent, Data, Experiment, Retriever, Tokenizer
from rlrag.data.task import open_task
from rlrag.data.text import Openings, corpus_texts, open_text_task, open_tokenizer, read_passages
from rlrag.evaluate import play_script, summarize
from rlrag.retrieval.bm25 import Bm25Index
from tests.films import write_films
from tests.shared_data import FIXTURES, present


@pytest.fixture
def experiment(tmp_path):
    questions, passages = write_films(tmp_path)
    return Experiment(
        data=Data(f"{questions}?split=train&skip=2", f"{questions}?split=train&n=2", f"{questions}?split=dev"),
        tokenizer=Tokenizer(train_vocab_size=400),
        retriever=Retriever(kind="bm25", corpus=str(passages)),
        agent=Agent(k=2, max_turns=4, max_tokens_per_turn=96, instruction="Question: {question}\n"),
    )


def test_the_task_of_questions_and_a_corpus(experiment):
    task = open_task(experiment)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [6, 2, 4]
    assert (task.workflow.k, task.workflow.max_turns) == (2, 4)
    found = task.index.search([task.test[0].question], 2)[0]
    assert found[0].id in task.test[0].gold
    assert task.demonstrate is not None
    for example in task.train:
        assert task.demonstrate(example, 0).streams[0].num_tokens <= task.workflow.max_tokens


def test_bounds_frame_the_result(experiment):
    task = open_text_task(experiment)
    scores = {name: summarize(play_script(task, task.test, script_of)) for name, script_of in task.bounds.items()}
    assert scores["oracle"]["em"] == scores["oracle"]["recall"] == 1
    assert scores["random"]["em"] == 0, "no town of the training questions is right for a test question"
    assert 0 < scores["random"]["searches"] <= 1


def test_there_is_no_oracle_without_gold(experiment):
    experiment.data.test = str(FIXTURES / "nq_open.jsonl")
    assert set(open_text_task(experiment).bounds) == {"random"}


@pytest.mark.parametrize("name", ["bamboogle.jsonl", "nq_open.jsonl", "hotpotqa.json", "musique.jsonl", "ircot.jsonl"])
def test_questions_of_any_format_can_be_trained_on(experiment, name):
    path = str(FIXTURES / name)
    experiment.data = Data(path, path, path)
    task = open_text_task(experiment)
    assert task.demonstrate is not None
    for number in range(8):
        assert task.demonstrate(task.train[0], number).streams[0].act.any()


def test_every_tag_is_one_token_and_every_text_can_be_spelled(experiment):
    tokenizer = open_text_task(experiment).tokenizer
    assert all(len(tokenizer.encode(tag)) == 1 for tag in Tags().strings)
    assert tokenizer.decode(tokenizer.encode("Łódź, 東京\n\t<search>")) == "Łódź, 東京\n\t<search>"
    assert tokenizer.vocab_size <= 400


def test_a_run_keeps_its_tokenizer_and_training_it_again_gives_the_same(experiment, tmp_path):
    passages = corpus_texts(read_passages(experiment))
    first = open_tokenizer(experiment, passages, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    kept, again = open_tokenizer(experiment, passages, tmp_path / "run"), open_tokenizer(experiment, passages)
    assert first.token_bytes() == kept.token_bytes() == again.token_bytes()
    experiment.tokenizer.path = str(tmp_path / "run" / "tokenizer")
    assert open_tokenizer(experiment, []).token_bytes() == first.token_bytes(), "a path needs no corpus"


def test_a_kept_tokenizer_of_something_else(experiment, tmp_path):
    passages = corpus_texts(read_passages(experiment))
    open_tokenizer(experiment, passages, tmp_path)
    experiment.tokenizer.train_vocab_size = 300
    assert open_tokenizer(experiment, passages, tmp_path).vocab_size == 300, "nothing was learned with the old one"
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"trained on other texts or another size \(sha256 differ\): remove it"):
        open_tokenizer(experiment, passages[1:], tmp_path)
    experiment.tokenizer.cache = str(tmp_path / "cache")
    open_tokenizer(experiment, passages, tmp_path)
    experiment.tokenizer.train_vocab_size = 310
    with pytest.raises(
        ValueError, match=r"cache holds a tokenizer .*\(vocab_size differ\).*--config.tokenizer.cache=DIR"
    ):
        open_tokenizer(experiment, passages, tmp_path)


@pytest.mark.parametrize("words", [0, 3])
def test_openings_of_passages_found_by_all_of_them(experiment, words):
    index = Bm25Index(read_passages(experiment))
    whole, (found,) = index.search(["lived in Porto"], 2)[0], Openings(index, words).search(["lived in Porto"], 2)
    assert [p.id for p in found] == [p.id for p in whole]
    assert found[0].text == ("Maria Costa was" if words else whole[0].text)
    assert "Porto" not in found[0].text or not words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "world"},
            "retriever.kind is 'world', .*--config.retriever.kind=bm25 and --config.retriever.corpus=FILE",
        ),
        ({"corpus": ""}, "retriever.corpus is '', which is no file .*: give --config.retriever.corpus=FILE"),
        ({"corpus": "nowhere.jsonl.gz"}, "retriever.corpus is 'nowhere.jsonl.gz', which is no file"),
    ],
)
def test_a_missing_corpus_is_told_in_one_line(experiment, changes, message):
    for name, value in changes.items():
        setattr(experiment.retriever, name, value)
    with pytest.raises(ValueError, match=message) as error:
        open_task(experiment)
    assert "\n" not in str(error.value)


def test_missing_questions_are_told(experiment):
    experiment.data.validation = "nowhere.jsonl?n=3"
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        open_task(experiment)


@pytest.mark.parametrize("path", present("corpus/passages.jsonl.gz"))
def test_a_real_vocabulary_is_the_same_every_time(path):
    settings = Experiment(
        retriever=Retriever(kind="bm25", corpus=str(path)), tokenizer=Tokenizer(train_vocab_size=1024)
    )
    passages = corpus_texts(read_passages(settings)[:2000])
    assert open_tokenizer(settings, passages).token_bytes() == open_tokenizer(settings, passages).token_bytes()
