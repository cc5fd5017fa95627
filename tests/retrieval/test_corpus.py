import gzip

import pytest

from rlrag.retrieval import corpus
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import OFFSETS, PASSAGES, StoredPassages, read_corpus, split_contents, store, stored_digest
from rlrag.trajectory import Passage
from tests.shared_data import FIXTURES

TITLED = FIXTURES / "corpus_titled.jsonl"
MANY = [Passage(f"p{i}", f"title {i}", f"text {i} " * (i % 5)) for i in range(100)]


def test_reads_both_published_layouts(tmp_path):
    assert next(read_corpus(TITLED)) == Passage(
        "a", "Marn", "Marn is a river town. The bridge of Marn was built by Ada Holt."
    )
    contents = FIXTURES / "corpus_contents.jsonl"
    passages = list(read_corpus(contents))
    assert [(p.id, p.title) for p in passages] == [("0", "Marn"), ("1", "Ada Holt"), ("2", ""), ("3", "Örensund")]
    assert passages[2].text == "Untitled line about a bridge, with no title."
    assert passages[3].text == "A harbour.\nSecond line of the text."
    packed = tmp_path / "renamed.without.suffix"
    packed.write_bytes(gzip.compress(contents.read_bytes()))
    assert list(read_corpus(packed)) == passages


def test_reads_beir_s_layout(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "4", "title": "T", "text": "x", "metadata": {}}\n')
    assert list(read_corpus(path)) == [Passage("4", "T", "x")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{not json}", r"line 2: not JSON \(.*\); give one object a line"),
        (b'["id", "text"]', "line 2: a JSON list; give an object with id and contents"),
        (b'{"contents": "no id"}', "line 2: field 'id' is None; give a string or an integer"),
        (b'{"id": true, "contents": "x"}', "line 2: field 'id' is True"),
        (b'{"id": "b", "body": "x"}', "line 2: field 'contents' is 'None'; give contents, or title and text"),
        (b'{"id": "b", "text": "x"}', "line 2: field 'title' is 'None'"),
        (b'{"id": "b", "title": "t", "text": 3}', "line 2: field 'text' is '3'; give a string"),
        (b'{"id": "a", "contents": "again"}', "line 2: id 'a' is also on line 1; give each passage its own"),
        (b'{"id": "b", "contents": "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_fault_and_remedy(tmp_path, row, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": "a", "contents": "fine"}\n' + row + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        Bm25Index.from_jsonl(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_damaged_gzip_and_empty_corpus(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(TITLED.read_bytes())[:-12])
    with pytest.raises(ValueError, match=r"corpus.jsonl.gz, line \d+: damaged gzip data"):
        list(read_corpus(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no passages"):
        Bm25Index.from_jsonl(path)


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Marn"\nA town.', "Marn", "A town."),
        ('"a "quoted" title"\ntext', 'a "quoted" title', "text"),
        ('""\ntext', "", "text"),
        ('"alone"', "alone", ""),
        ("one line", "", "one line"),
        ("Marn\nA town.\nMore.", "Marn", "A town.\nMore."),
        ("", "", ""),
    ],
)
def test_contents_are_title_and_text(contents, title, text):
    assert split_contents(contents) == (title, text)


def test_stored_passages_are_the_passages(tmp_path):
    assert list(store(MANY, tmp_path)) == [100]
    stored = StoredPassages(tmp_path)
    assert list(stored) == MANY and len(stored) == 100
    with pytest.raises(IndexError):
        stored[100]
    digest = stored_digest(tmp_path)
    assert list(store(MANY, tmp_path)) == [100]  # nothing is left to do
    assert stored_digest(tmp_path) == digest


@pytest.mark.parametrize("cut", [0, 1, 700, 2000])
@pytest.mark.parametrize("offsets_cut", [0, 3, 8, 200])
def test_a_killed_store_goes_on(tmp_path, monkeypatch, cut, offsets_cut):
    """Whatever the two files were cut to, lines and offsets, the rest is written once."""
    monkeypatch.setattr(corpus, "FLUSH_EVERY", 16)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert list(store(MANY, whole)) == [16, 32, 48, 64, 80, 96, 100]
    running = store(MANY, killed)
    for _ in range(4):
        next(running)
    running.close()
    for name, less in ((PASSAGES, cut), (OFFSETS, offsets_cut)):
        with open(killed / name, "r+b") as file:
            file.truncate(max(0, (killed / name).stat().st_size - less))
    assert list(store(MANY, killed))[-1] == 100
    for name in (PASSAGES, OFFSETS):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_stored_passages_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no passages \(passages.jsonl is missing\)"):
        StoredPassages(tmp_path)
    list(store(MANY, tmp_path))
    with open(tmp_path / PASSAGES, "ab") as file:
        file.write(b"{}")
    with pytest.raises(ValueError, match=r"passages.jsonl has .* bytes and should have"):
        StoredPassages(tmp_path)
