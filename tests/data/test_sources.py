import gzip
import json
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from rlrag.data.formats import PARSERS, passage_id
from rlrag.data.sources import FileSource, TfdsSource, iterate, load_examples, to_record
from rlrag.trajectory import Example, Passage
from tests.shared_data import FIXTURES, present, read_json

MARN = passage_id("Marn", "Marn is a town. Its bridge was built by Ada Holt.")
PROMPT = "Answer with tags. For example, <answer> Beijing </answer>. Question: who built the bridge of marn?\n"


def fixture(name):
    return load_examples(FIXTURES / name)


def test_passage_ids_are_those_of_the_pooled_corpora():
    assert passage_id("  Marn ", "is\n a  town") == passage_id("Marn", "is a town") == "w6c17fa730086"
    for path in present("corpus/passages.jsonl.gz"):
        assert all(passage_id(row["title"], row["text"]) == row["id"] for row in read_json(path))


def test_hotpotqa():
    first, second = fixture("hotpotqa.json")
    assert first.id == "h1"
    assert first.question == "Who built the bridge of the town where Ivo Rask was born?"
    assert first.answers == ("Ada Holt",)
    assert first.hops == 2
    assert first.gold == (passage_id("Ivo Rask", "Ivo Rask, a painter, was born in Marn."), MARN)  # order of the facts
    assert first.scope is None
    assert first.fields["paragraphs"][1] == Passage(MARN, "Marn", "Marn is a town. Its bridge was built by Ada Holt.")
    assert first.fields["type"] == "bridge"
    assert set(first.fields) == {"type", "level", "supporting_facts", "paragraphs"}
    assert (second.gold, second.hops) == ((MARN,), 2)  # a fullwiki context may lack a supporting paragraph


def test_2wikimultihopqa():
    (example,) = fixture("2wikimultihopqa.json")
    titles = {passage.id: passage.title for passage in example.fields["paragraphs"]}
    assert [titles[id] for id in example.gold] == ["Low Tide", "Ines Vale", "High Noon (song)", "Tor Lind"]
    assert example.hops == 4
    assert example.fields["paragraphs"][0].text == "Ines Vale( born 1950) is a singer. She lives in Veld."
    assert example.fields["answer_id"] == "Q1"
    assert example.fields["evidences"][1] == ["Ines Vale", "date of birth", "1950"]


def test_musique():
    (example,) = fixture("musique.jsonl")
    titles = {passage.id: passage.title for passage in example.fields["paragraphs"]}
    assert [titles[id] for id in example.gold] == ["Ivo Rask", "Marn"]  # hop order, not file order
    assert example.answers == ("Osel county", "Osel")
    assert example.hops == 2
    assert example.fields["answerable"] is True


def test_ircot():
    span, date, number = fixture("ircot.jsonl")
    assert (span.answers, span.gold, span.hops) == (("Ada Holt", "A. Holt"), (MARN,), 1)
    assert (date.answers, date.gold, date.hops) == (("3 May 1961",), (), None)
    assert number.answers == ("2",)


def test_formats_without_paragraphs():
    listed, single = fixture("bamboogle.jsonl")
    assert (listed.id, listed.answers) == ("bamboogle_1", ("Ivo Rask",))
    assert (single.id, single.answers) == ("bamboogle-1", ("1203",))  # named after file and number
    assert [(e.id, e.answers) for e in fixture("nq_open.jsonl")] == [
        ("nq_open-0", ("Ada Holt", "Holt")),
        ("nq_open-1", ("90 miles",)),
    ]
    pooled, _ = fixture("pooled.jsonl")
    assert (pooled.hops, pooled.gold) == (2, ("w958c518ae647", MARN))
    assert pooled.fields == {"dataset": "hotpotqa", "split": "train", "type": "bridge"}
    truth, numbers = fixture("plain.jsonl")
    assert truth == Example("plain-0", "Is Veld a town?", ("yes",))
    assert numbers == Example("7", "What is two and two?", ("4", "four"), 1, ("w000000000001",), "sums")


def search_r1_rows():
    return [
        {
            "data_source": source,
            "prompt": [{"content": PROMPT, "role": "user"}],
            "ability": "fact-reasoning",
            "reward_model": {"ground_truth": {"target": ["Ada Holt", "Holt"]}, "style": "rule"},
            "extra_info": {"index": number, "split": "train"},
        }
        for number, source in enumerate(["nq", "hotpotqa"])
    ]


def test_search_r1_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(search_r1_rows()), path)
    first, second = load_examples(path)
    assert (first.id, first.question) == ("nq/train-0", "who built the bridge of marn?")
    assert (second.id, second.answers) == ("hotpotqa/train-1", ("Ada Holt", "Holt"))
    assert second.fields["data_source"] == "hotpotqa"
    columns = [
        row | {"id": "train_0", "question": "who built it?", "golden_answers": ["Ada"]} for row in search_r1_rows()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), path)
    examples = load_examples(path)  # merged sets number each source from 0
    assert [(e.id, e.question, e.answers) for e in examples] == [
        ("nq/train_0", "who built it?", ("Ada",)),
        ("hotpotqa/train_0", "who built it?", ("Ada",)),
    ]


@pytest.mark.parametrize("name", ["hotpotqa.json", "musique.jsonl", "nq_open.jsonl"])
def test_content_and_not_the_name_tells_the_container(tmp_path, name):
    examples = fixture(name)
    path = tmp_path / name.split(".")[0]  # no suffix at all
    path.write_bytes(gzip.compress((FIXTURES / name).read_bytes()))
    assert load_examples(path) == examples
    rows = read_json(FIXTURES / name)
    path.write_text("\ufeff\n" + "\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert load_examples(path) == examples
    path.write_text(json.dumps(rows, indent=2))
    assert load_examples(path) == examples
    assert FileSource(path)[len(rows) - 1] == examples[-1]
    assert len(FileSource(path)) == len(rows)


def test_a_named_format_overrides(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.loads((FIXTURES / "nq_open.jsonl").read_text().splitlines()[0]) | {"gold_ids": []}
    path.write_text(json.dumps(row))
    assert load_examples(path) == load_examples(path, "jsonl")
    with pytest.raises(ValueError, match=r"line 1: field 'context' is missing; give it, or name another format"):
        load_examples(path, "hotpotqa")
    with pytest.raises(ValueError, match=r"format is 'squad': give one of hotpotqa, .*jsonl"):
        load_examples(path, "squad")


GOOD = '{"question": "q?", "answers": ["a"]}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions; give a file with at least one row"),
        (GOOD + "{broken", "line 2: not JSON .*; give one object a line"),
        ('[{"question": "q?", "answers": ["a"]},\n 3', "line 2: not JSON .*; give a JSON list"),
        ('[{"question": "q?", "answers": ["a"]},\n 3]', "row 2: a JSON int; give an object"),
        (GOOD + '{"question": "q?"}', "line 2: field 'answers' is missing"),
        (GOOD + '{"question": " ", "answers": ["a"]}', "line 2: the question is ' '; give a text"),
        (GOOD + '{"question": "q?", "answers": []}', r"line 2: the answers are '\[\]'; give at least one"),
        (GOOD + '{"question": "q?", "answers": [" "]}', "line 2: the answers are .*; give at least one"),
        (GOOD + '{"question": "q?", "answers": {"a": 1}}', "line 2: the answers are .*; give a string or a list"),
        (
            GOOD + '{"question": "q?", "answers": ["a"], "hops": "2"}',
            "line 2: field 'hops' is '2'; give a whole number",
        ),
        (GOOD + '{"question": "q?", "answers": ["a"], "gold": "w1"}', "line 2: gold passage ids are 'w1'; give a list"),
        (GOOD + '{"id": "x-0", "question": "q?", "answers": ["a"]}', "id 'x-0' is also in line 1; give each"),
        ('{"a": 1, "b": 2}', "a row with fields a, b is of no known format; give rows with question and answers"),
        (
            json.dumps({"context": [["t", 3]], "supporting_facts": [], "answer": "a", "question": "q"}),
            "give the published",
        ),
        (
            json.dumps({"question_decomposition": [{"paragraph_support_idx": 4}], "paragraphs": []}),
            "field 'paragraph_support_idx' is 4, which no paragraph has",
        ),
        ('{"question_decomposition": [3], "paragraphs": []}', "line 1: not of the layout of format 'musique'"),
        ('{"reward_model": {"ground_truth": ["a"]}, "prompt": []}', "field 'prompt' has no turn of role 'user'"),
    ],
)
def test_a_bad_file_is_one_line_with_file_row_fault_and_remedy(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}")
    assert "\n" not in str(error.value)


def test_damaged_bytes(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(GOOD.encode() * 50)[:-9])
    with pytest.raises(ValueError, match="damaged gzip data"):
        load_examples(path)
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ValueError, match="neither UTF-8 text nor parquet"):
        load_examples(path)
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match="damaged parquet"):
        load_examples(path)
    with pytest.raises(FileNotFoundError):
        load_examples(tmp_path / "absent.jsonl")


WITH_PARAGRAPHS = present(
    "multihop/hotpot_train_v1.1.sample.json",
    "multihop/hotpot_dev_distractor_v1.sample.json",
    "multihop/ircot_hotpotqa_dev_subsampled.sample.jsonl.gz",
    "multihop/musique_ans_v1.0_train.sample.jsonl.gz",
    "multihop/musique_ans_v1.0_dev.sample.jsonl.gz",
    "multihop/2wikimultihopqa_train.sample.json.gz",
    "multihop/2wikimultihopqa_dev.sample.json",
)


@pytest.mark.parametrize(
    ("path", "pool"),
    [
        (FIXTURES / "hotpotqa.json", FIXTURES / "pooled.jsonl"),
        *((path, pool) for path in WITH_PARAGRAPHS for pool in present("corpus/questions.jsonl.gz")),
    ],
    ids=lambda path: path.name,
)
def test_files_agree_with_the_pooled_questions(path, pool):
    """Id, question, answers, hops and gold passages. (Four 2Wiki questions share a paragraph with a copy, differing
    in punctuation, that another set brought into the pool: there the pool has the other copy's id.)"""
    pooled = {e.id: e for e in load_examples(pool)}
    examples = load_examples(path)
    assert examples
    for example in examples:
        stored = pooled[example.id]
        assert (example.question, example.answers, example.hops) == (stored.question, stored.answers, stored.hops)
        assert len(example.gold) == len(stored.gold)
        assert set(example.gold) <= {passage.id for passage in example.fields["paragraphs"]}
    other = [example.id for example in examples if example.gold != pooled[example.id].gold]
    assert len(other) == (4 if "2wikimultihopqa_train" in path.name else 0)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (FIXTURES / "nq_open.jsonl", 2),
        *((path, 75) for path in present("multihop/bamboogle.sample.jsonl")),
        *((path, 2000) for path in present("odqa/NQ-open.dev.sample.jsonl")),
        *((path, 1648) for path in present("corpus/questions.jsonl.gz")),
    ],
    ids=str,
)
def test_every_row_is_read(path, number):
    examples = load_examples(path)
    assert len({example.id for example in examples}) == len(examples) == number
    assert all(example.question and example.answers for example in examples)


# Order, shards and cursor


def numbered(count):
    return [Example(str(n), "q?", ("a",)) for n in range(count)]


def drawn(iterator, batches):
    return [int(example.id) for _ in range(batches) for example in next(iterator)]


def test_every_epoch_is_a_fresh_permutation():
    draws = drawn(iterate(numbered(12), seed=3, batch_size=4), 9)
    epochs = [draws[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(12))}) == 4
    again = drawn(iterate(numbered(12), seed=3, batch_size=4), 9)
    other = drawn(iterate(numbered(12), seed=4, batch_size=4), 9)
    assert again == draws
    assert not {tuple(other[i : i + 12]) for i in (0, 12, 24)} & {tuple(epoch) for epoch in epochs}


def test_shards_together_draw_the_one_sequence():
    whole = drawn(iterate(numbered(10), seed=0, batch_size=1), 36)
    shards = [drawn(iterate(numbered(10), seed=0, batch_size=2, shard=(i, 3)), 6) for i in range(3)]
    assert [n for turn in zip(*shards) for n in turn] == whole  # level after 3.6 epochs, though 3 does not divide 10


def test_one_pass():
    batches = list(iterate(numbered(7), seed=0, batch_size=3, repeat=False, shuffle=False))
    assert [[e.id for e in batch] for batch in batches] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    halves = [list(iterate(numbered(7), seed=0, batch_size=3, shard=(i, 2), repeat=False)) for i in range(2)]
    assert sorted(int(e.id) for half in halves for batch in half for e in batch) == list(range(7))


def test_the_cursor_goes_on_exactly_there():
    iterator = iterate(numbered(10), seed=5, batch_size=3, shard=(1, 2))
    drawn(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = drawn(iterator, 20)
    resumed = iterate(numbered(10), seed=5, batch_size=3, shard=(1, 2))
    resumed.set_state(state)
    assert drawn(resumed, 20) == expected
    iterator.set_state(state)
    assert drawn(iterator, 20) == expected


def test_nothing_is_read_ahead_or_in_other_threads():
    asked = []

    class World:
        def __len__(self):
            return 1000

        def __getitem__(self, n):
            asked.append(threading.current_thread())
            return Example(str(n), "q?", ("a",))

    next(iterate(World(), seed=0, batch_size=4))
    assert asked == [threading.current_thread()] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard": (2, 2)}, "shard is 2 of 2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_order_options_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        iterate(numbered(3), **({"seed": 0, "batch_size": 1} | options))
    with pytest.raises(ValueError, match="holds no examples"):
        iterate([], seed=0, batch_size=1)


# TFDS


class Squad(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset as others prepare them: nested answers, no fields_json."""

    name = "squad_like"
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
        features = tfds.features.FeaturesDict(
            {
                "qid": text,
                "query": text,
                "title": text,
                "answers": tfds.features.Sequence({"text": text, "answer_start": number}),
                "gold": {"value": text, "aliases": tfds.features.Sequence(text)},
                "level": number,
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for n in range(count):
            answers = [{"text": f"Örensund {n}", "answer_start": 3}, {"text": "Marn", "answer_start": 9}]
            gold = {"value": f"v{n}", "aliases": ["x", "y"]}
            yield n, {"qid": f"s{n}", "query": "où?", "title": "T", "answers": answers, "gold": gold, "level": n}


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    Squad(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_a_dataset_prepared_by_others(squad):
    names = {"question_field": "query", "answers_field": "answers/text", "id_field": "qid"}
    source = TfdsSource("squad_like", "train", data_dir=squad, **names)
    assert len(source) == 10
    assert (source[3].id, source[3].question, source[3].answers) == ("s3", "où?", ("Örensund 3", "Marn"))
    assert source[3].fields == {"title": "T", "gold": {"value": "v3", "aliases": ["x", "y"]}, "level": 3}
    assert source[-1] == source[9]
    assert [example.id for example in source[2:4]] == ["s2", "s3"]
    with pytest.raises(IndexError):
        source[10]
    by_path = TfdsSource(squad / "squad_like" / "1.2.0", "train[50%:]", **names)
    assert [e.id for e in by_path] == ["s5", "s6", "s7", "s8", "s9"]
    nested = TfdsSource("squad_like", "validation", data_dir=squad, question_field="query", answers_field="gold/value")
    assert [(e.id, e.answers) for e in nested] == [("validation-0", ("v0",)), ("validation-1", ("v1",))]
    batch = next(iterate(source, seed=0, batch_size=4))
    assert len({example.id for example in batch}) == 4


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("squad", {}, "'squad' is not prepared in .*/squad/.*: run download_and_prepare"),
        ("squad_like", {}, "there is no 'question' among answers, .*title; name the right one with question_field="),
        ("squad_like", {"question_field": "query", "answers_field": "answers/texts"}, "no 'answers/texts' among"),
        ("squad_like", {"split": "test"}, "split 'test': Unknown split 'test'. Should be one of"),
        ("no_such_dataset", {}, "there is no TFDS dataset 'no_such_dataset' in .*: prepare it with"),
    ],
)
def test_what_is_not_there_is_named(squad, dataset, options, message):
    with pytest.raises(ValueError, match=message) as error:
        TfdsSource(dataset, **({"split": "train", "data_dir": squad} | options))
    assert "\n" not in str(error.value)


def test_a_dataset_that_cannot_be_read_at_random(squad, tmp_path):
    directory = tmp_path / "squad_like" / "1.2.0"
    directory.mkdir(parents=True)
    info = json.loads((squad / "squad_like/1.2.0/dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (directory / "features.json").write_bytes((squad / "squad_like/1.2.0/features.json").read_bytes())
    with pytest.raises(ValueError, match="holds tfrecord files, which cannot be read at random: prepare it again"):
        TfdsSource(directory)


def test_records_hold_everything():
    record = to_record(fixture("musique.jsonl")[0])
    assert (record["hops"], record["scope"]) == (2, "")
    assert json.loads(record["fields_json"])["paragraphs"][0]["title"] == "Marn"
    assert to_record(Example("1", "q?", ("a",)))["hops"] == -1
    assert "bamboogle" in PARSERS


@pytest.mark.parametrize(
    ("row", "question", "answers", "solution"),
    [
        ({"question": "2+2?", "answer": "so\n#### 1,004"}, "2+2?", ("1004",), "so\n#### 1,004"),
        ({"prompt": "write"}, "write", (), None),
        ({"prompt": "add", "answer": 4, "solution": "4"}, "add", ("4",), "4"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                          {"role": "assistant", "content": "ho"}]},
            "hi", (), "ho",
        ),
    ],
)  # fmt: skip
def test_rows_of_a_users_own_task(tmp_path, row, question, answers, solution):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"level": 3}) + "\n")
    (example,) = load_examples(path)
    assert (example.question, example.answers, example.fields.get("solution")) == (question, answers, solution)
    assert example.fields["level"] == 3


def test_a_chat_without_a_question_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*holds no user message; give a list of"):
        load_examples(path)
