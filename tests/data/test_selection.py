import pytest

from rlrag.data.selection import open_file
from tests.films import write_films
from tests.shared_data import FIXTURES, present


@pytest.fixture
def questions(tmp_path):
    return write_films(tmp_path)[0]


def ids(spec, format=None):
    return [example.id for example in open_file(str(spec), format)]


def test_all_of_a_file_in_its_order(questions):
    assert ids(questions) == [f"film-{number}" for number in range(12)]


def test_rows_by_field_and_by_hops(questions):
    assert ids(f"{questions}?split=dev") == [f"film-{number}" for number in range(8, 12)]
    assert ids(f"{questions}?split=train&dataset=musique,hotpotqa&hops=2&n=4") == [
        "film-0",
        "film-2",
        "film-3",
        "film-5",
    ]


def test_two_parts_of_one_order_share_nothing_and_lose_nothing(questions):
    first, rest = ids(f"{questions}?split=train&seed=5&n=3"), ids(f"{questions}?n=100&split=train&seed=5&skip=3")
    assert len(first) == 3
    assert sorted(first + rest) == [f"film-{number}" for number in range(8)]
    assert first + rest != sorted(first + rest), "the order was drawn"
    assert first == ids(f"{questions}?split=train&seed=5&n=3"), "and is the same every time"
    assert rest[:2] == ids(f"{questions}?split=train&seed=5&skip=3&n=2"), "skip comes before n"
    assert first + rest != ids(f"{questions}?split=train&seed=6")


def test_the_format_may_be_named():
    assert ids(FIXTURES / "pooled.jsonl", "pooled") == ids(FIXTURES / "pooled.jsonl")
    with pytest.raises(ValueError, match="give one of"):
        ids(FIXTURES / "pooled.jsonl", "nothing")


def test_a_file_whose_name_has_a_question_mark(questions):
    odd = questions.rename(questions.with_name("what?split=dev"))
    assert len(ids(odd)) == 12
    assert len(ids(f"{odd}?n=2")) == 2


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("splt=dev", "no row has a field 'splt'; there are: n, skip, seed, hops, dataset, split, type$"),
        ("split=test", "no row has split=test; there are: dev, train$"),
        ("hops=3", "no row has hops=3; there are: 2$"),
        ("n=ten", "n is 'ten', give a whole number of at least 0$"),
        ("seed=-1", "seed is '-1', give a whole number"),
        ("split=dev&skip=4", "nothing is left of 4 questions after skip=4 and n=4$"),
        ("n=0", "nothing is left of 12 questions"),
        ("dev", "write FILE.field=value&n=100"),
    ],
)
def test_a_wrong_selection_is_told_in_one_line(questions, query, message):
    with pytest.raises(ValueError, match=message) as error:
        open_file(f"{questions}?{query}")
    assert str(questions) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.jsonl?split=dev"])
def test_a_missing_file_is_told_with_the_remedy(tmp_path, name):
    with pytest.raises(ValueError, match=r"nowhere.jsonl does not exist \(seen from .*--config.data.train=FILE"):
        open_file(str(tmp_path / name))


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        open_file(str(tmp_path))


@pytest.mark.parametrize("path", present("corpus/questions.jsonl.gz"))
def test_the_shared_questions(path):
    sets = "dataset=hotpotqa,2wikimultihopqa,musique"
    train, held_out = ids(f"{path}?split=train&{sets}&seed=0&skip=64"), ids(f"{path}?split=train&{sets}&seed=0&n=64")
    assert (len(train), len(held_out), len(set(train) & set(held_out))) == (636, 64, 0)
    assert len(ids(f"{path}?split=dev&{sets}")) == 599
