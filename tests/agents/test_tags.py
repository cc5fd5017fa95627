import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.agents.tags import ANSWER, FORGED, NONE, SEARCH, THINK, Tag, Tags, label_tokens
from rlrag.agents.tokenizer import train_bpe

TAGS = Tags()


@pytest.mark.parametrize(
    ("text", "name", "content"),
    [
        ("<search> who is Ada </search>", "search", "who is Ada"),
        ("<think>a</think>\n<answer>\n Paris \n</answer>", "answer", "Paris"),
        ("<search>a</search><answer>b</answer>", "search", "a"),
        ("<answer>b</answer><search>a</search>", "answer", "b"),
        ("<answer>b <search>a</search>", "search", "a"),
        ("<search>a <search>b</search>", "search", "b"),
        ("<think>I could <search>x</search>", "search", "x"),
        ("</search> <answer>b</answer>", "answer", "b"),
        ("<answer></answer>", "answer", ""),
        ("<answer>a</search>", None, ""),
        ("<search>a", None, ""),
        ("a</search>", None, ""),
        ("<information>x</information>", None, ""),
        ("<SEARCH>a</SEARCH>", None, ""),
        ("", None, ""),
    ],
)
def test_action(text, name, content):
    assert TAGS.parse(text) == (name, content)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("<think>a</think> <search>b</search>\n", ["think", "search"]),
        ("well <search>b</search> so", ["text", "search", "text"]),
        ("<think>a <answer>b</answer>", ["broken", "answer"]),
        ("<think>a</answer>", ["broken"]),
        ("</think><think>", ["broken", "broken"]),
        ("<information>Doc 1</information><answer>x</answer>", ["information", "answer"]),
        ("  \n", []),
    ],
)
def test_blocks_are_the_models(text, blocks):
    assert TAGS.read(text.encode()).blocks == [(name, "model") for name in blocks]


def test_forced_opening():
    reading = TAGS.read(b" Paris </answer>", inside="answer")
    assert reading.action == ("answer", "Paris")
    assert reading.blocks == [("answer", "model")]
    assert TAGS.read(b" Paris", inside="answer").action.name is None


def label(tokens: list[bytes]) -> list[int]:
    return label_tokens([len(token) for token in tokens], TAGS.read(b"".join(tokens)).regions).tolist()


def test_labels_of_split_and_merged_tags():
    assert label([b"<thi", b"nk>", b"a", b"</", b"think", b">\n", b" "]) == [THINK] * 6 + [NONE]
    assert label([b"x", b" <", b"search", b">q", b"</search", b"><", b"answer>a</answer>"]) == [
        NONE,
        SEARCH,
        SEARCH,
        SEARCH,
        SEARCH,
        SEARCH,
        ANSWER,
    ]
    assert label([b"a <search>b</search> c"]) == [SEARCH]
    assert label([]) == []
    assert label([b"", b"<answer>", b""]) == [ANSWER] * 3 or label([b"", b"<answer>", b""])[1] == ANSWER


def test_information_the_model_wrote_is_forged():
    assert label([b"<information>", b"gold", b"</information>", b"<answer>"]) == [FORGED] * 3 + [ANSWER]


pieces = st.sampled_from([*TAGS.strings, "a", " ", "<", "/", "ö", "think>", "\n"])


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=12).map("".join), st.data())
def test_labels_do_not_depend_on_how_the_text_is_cut(text, data):
    """Bytes are labelled one way; a token takes the first label among its bytes, however the text is tokenised."""
    raw = text.encode()
    regions = TAGS.read(raw).regions
    by_byte = label_tokens([1] * len(raw), regions)
    assert (regions[-1][1] if regions else 0) == len(raw)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=8)) | {0, len(raw)})
    lengths = np.diff(cuts)
    expected = [next((x for x in by_byte[a:b] if x), NONE) for a, b in itertools.pairwise(cuts)]
    assert label_tokens(lengths.tolist(), regions).tolist() == expected


def test_bpe_without_tag_tokens_reads_the_same():
    tokenizer = train_bpe(["<think> x </think><search> y </search>"] * 3, 300)
    text = "<think>why</think><search>who</search>"
    ids = tokenizer.encode(text)
    assert len(ids) > 4
    pieces = [tokenizer.token_bytes()[i] for i in ids]
    reading = TAGS.read(b"".join(pieces))
    assert reading.action == ("search", "who")
    labels = label_tokens([len(piece) for piece in pieces], reading.regions)
    assert set(labels.tolist()) == {THINK, SEARCH}


def test_other_tag_sets():
    tags = Tags(
        think=Tag("<reason>", "</reason>"),
        search=Tag("<|begin_query|>", "<|end_query|>"),
        information=Tag("<documents>", "</documents>"),
        answer=Tag("\\boxed{", "}"),
    )
    assert tags.parse("<|begin_query|> x <|end_query|>") == ("search", "x")
    assert tags.parse("\\boxed{7}") == ("answer", "7")
    assert tags.stop == ("<|end_query|>", "}")
    with pytest.raises(ValueError, match="must be different"):
        Tags(search=Tag("<answer>", "</search>"))
