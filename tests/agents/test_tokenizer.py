import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import Tokenizer, train_bpe, word_tokenizer

TEXTS = ["the mentor of Ada is Boris", "<search> capital of Österreich </search>", "naïve café 東京\n\n  x = 1;"] * 4
BPE = train_bpe(TEXTS, 330, special=Tags().strings)


def sentencepiece() -> Tokenizer:
    """A small vocabulary of the Llama 2 shape: "▁" for a space, bytes for what it lacks."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "the", "cat", "s", "a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>")])
    return Tokenizer(backend, end="</s>")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_byte_level_round_trip_is_exact(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.join(ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30))
def test_token_bytes_agree_with_the_backend(ids):
    # the backend's own decoder is the oracle for what arbitrary ids mean
    assert BPE.decode(ids) == BPE.backend.decode(ids, skip_special_tokens=False)


def test_tags_are_one_token_each_and_kept_by_decode():
    for string in Tags().strings:
        (token,) = BPE.encode(string)
        assert BPE.token_bytes()[token] == string.encode()
    assert BPE.decode(BPE.encode("a<search>b</search>")) == "a<search>b</search>"
    assert set(BPE.special) == {*Tags().strings, "<|end|>", "<|pad|>"}


def test_training_depends_on_the_texts_only():
    again = train_bpe(iter(TEXTS), 330, special=Tags().strings)
    assert again.token_bytes() == BPE.token_bytes()
    with pytest.raises(ValueError, match=r"vocab_size is 200.*need 266"):
        train_bpe(TEXTS, 200, special=Tags().strings)


def test_sentencepiece_bytes():
    tokenizer = sentencepiece()
    table = tokenizer.token_bytes()
    assert table[tokenizer.backend.token_to_id("▁cat")] == b" cat"
    assert table[tokenizer.backend.token_to_id("<0xC3>")] == b"\xc3"
    assert table[tokenizer.end_id] == b"</s>"
    ids = [tokenizer.backend.token_to_id(piece) for piece in ("▁the", "▁cat", "<0xC3>", "<0xB6>", "s")]
    assert tokenizer.decode(ids) == "the catös" == tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.join(ids) == " the catös".encode()


def test_words():
    tokenizer = word_tokenizer(["Ada", "</search>", "x"])
    text = "x Ada </search>"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.join(ids) == b" x Ada </search>"
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (0, 1, 5)
    with pytest.raises(ValueError, match="'Boris' is not in the word-level vocabulary"):
        tokenizer.encode("Ada Boris")
    with pytest.raises(ValueError, match="'Ada' appears twice"):
        word_tokenizer(["Ada", "Ada"])


@pytest.mark.parametrize("make", [lambda: BPE, sentencepiece, lambda: word_tokenizer(["a", "b"])])
def test_save_and_load(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.token_bytes() == tokenizer.token_bytes()
        assert (loaded.end_id, loaded.pad_id) == (tokenizer.end_id, tokenizer.pad_id)
    by_transformers = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert by_transformers.eos_token_id == tokenizer.end_id


def test_padding_may_be_the_end_and_nothing_is_added():
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", BPE.pad_id)])
    backend.enable_padding(length=8, pad_id=BPE.end_id, pad_token="<|end|>")
    backend.enable_truncation(max_length=3)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer = Tokenizer.from_transformers(fast)
    assert tokenizer.pad_id == tokenizer.end_id
    assert tokenizer.encode("x") == BPE.encode("x")
    assert tokenizer.encode("x" * 20) == BPE.encode("x" * 20)


def test_errors_name_the_value(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer at {tmp_path}"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"end token '</s>' is not in the vocabulary"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), end="</s>")
    word_piece = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    word_piece.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer(word_piece, end="a")
    (tmp_path / "tokenizer.json").write_text(BPE.backend.to_str())
    with pytest.raises(ValueError, match="names no eos_token"):
        Tokenizer.load(tmp_path)
