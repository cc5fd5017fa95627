"""The encoder against torch's vectors (tests/golden_encoders.py), and what must not change them."""

import dataclasses
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlrag.mesh import make_mesh
from rlrag.model.pooling import POOLINGS
from rlrag.retrieval import embed, encoder_settings
from rlrag.retrieval.embed import Encoder, padded_length, plan
from tests.encoders import CHECKPOINTS, FIXTURES, SENTENCES, TEXTS

BERT, QWEN3 = FIXTURES / "sentence-bert", FIXTURES / "Qwen3-Embedding-tiny"
INSTALLED = [name for name in ["minilm"] if importlib.util.find_spec(encoder_settings.MINILM_MODULE)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(BERT)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_vectors_are_those_of_torch(checkpoint):
    """Prefixes, cut texts, the empty text, pooling and norm as transformers and sentence-transformers have them."""
    mine, wanted = Encoder.load(FIXTURES / checkpoint.name, **checkpoint.given()), _expected(checkpoint.name)
    assert (mine.name, mine.dims) == (checkpoint.name, wanted["queries"].shape[1])
    for found, name in ((mine.encode_queries(TEXTS), "queries"), (mine.encode_passages(TEXTS), "passages")):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted[name], atol=1e-5)


@pytest.mark.parametrize("path", INSTALLED)
def test_the_real_model_is_that_of_sentence_transformers(path):
    mine = Encoder.load(path)
    assert (mine.name, mine.dims, mine.settings.max_tokens) == ("minilm", 384, 256)
    np.testing.assert_allclose(mine.encode_passages(SENTENCES), _expected(None)["passages"], atol=1e-5)


def _expected(name: str | None) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / name / "expected.safetensors" if name else FIXTURES / "minilm.safetensors")


def test_nothing_and_nothing_said(encoder):
    assert encoder.encode_queries([]).shape == (0, encoder.dims)
    assert np.linalg.norm(encoder.encode_passages([""])) == pytest.approx(1, abs=1e-6)
    # Llama's tokenizer here adds no token: no text, no tokens, and a vector of zeros.
    silent = Encoder.load(FIXTURES / "llama-mean", pooling="last", normalize=True)
    assert not silent.encode_passages(["", ""]).any()
    with pytest.raises(ValueError, match="texts is the string 'one': give a sequence of strings"):
        encoder.encode_queries("one")


def test_order_company_and_padding_change_nothing(encoder):
    together = encoder.encode_passages(TEXTS)
    backwards = encoder.encode_passages(TEXTS[::-1])[::-1]
    alone = np.concatenate([encoder.encode_passages([text]) for text in TEXTS])
    padded = Encoder.load(BERT, batch_tokens=10_000).encode_passages([*TEXTS, "a b c d e f " * 9, *["x"] * 20])
    for other in (backwards, alone, padded[: len(TEXTS)]):
        np.testing.assert_allclose(other, together, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_and_norm_are_as_asked(pooling):
    """Against NumPy over the hidden states that torch saved."""
    saved = _expected("sentence-bert")
    lengths, hidden = saved["lengths"], saved["hidden"].astype(np.float64)
    take = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}[pooling]
    wanted = np.array([take(row[:length]) for row, length in zip(hidden, lengths)])
    texts = [TEXTS[0], TEXTS[1], TEXTS[5]]
    found = Encoder.load(BERT, pooling=pooling, normalize=False, passage_prefix="").encode_passages(texts)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    unit = Encoder.load(BERT, pooling=pooling, normalize=True, passage_prefix="").encode_passages(texts)
    np.testing.assert_allclose(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


def test_prefixes_stand_before_the_text(encoder):
    plain = Encoder.load(BERT, query_prefix="", passage_prefix="")
    np.testing.assert_allclose(
        encoder.encode_queries(TEXTS), plain.encode_queries([f"which: {text}" for text in TEXTS]), atol=1e-6
    )
    np.testing.assert_allclose(
        encoder.encode_passages(TEXTS), plain.encode_queries([f"text: {text}" for text in TEXTS]), atol=1e-6
    )


def test_long_texts_are_cut_and_keep_their_last_token(encoder):
    long = "river " * 100
    whole = encoder.token_ids(["river " * 5])[0]
    cut = encoder.token_ids([long])[0]
    assert len(cut) == encoder.settings.max_tokens == 32
    assert (cut[0], cut[-1]) == (whole[0], whole[-1])  # [CLS] and [SEP]
    short = Encoder.load(BERT, max_tokens=5).token_ids([long])[0]
    assert (len(short), short[-1]) == (5, whole[-1])


def test_the_end_token_is_put_where_the_tokenizer_puts_none(tmp_path):
    qwen = Encoder.load(QWEN3)
    copy = tmp_path / "Qwen3-Embedding-old"
    shutil.copytree(QWEN3, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text()) | {"post_processor": None}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for mine, wanted in zip(Encoder.load(copy).token_ids(TEXTS), qwen.token_ids(TEXTS), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_lower_case_is_said_by_the_folder(tmp_path):
    copy = tmp_path / "qwen3-embedding-lower"
    shutil.copytree(QWEN3, copy)
    (copy / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    lower, plain = Encoder.load(copy), Encoder.load(QWEN3)
    np.testing.assert_array_equal(lower.token_ids(["River ELBE"])[0], plain.token_ids(["river elbe"])[0])


def test_many_threads_at_once(encoder):
    wanted = encoder.encode_queries(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: encoder.encode_queries(TEXTS), range(24)):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_bfloat16_stays_near(encoder):
    low = Encoder.load(BERT, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(low._params)} == {"bfloat16"}
    assert (low.encode_passages(TEXTS) * encoder.encode_passages(TEXTS)).sum(1).min() > 0.99
    assert low.digest != encoder.digest


def test_the_digest_tells_what_changes_vectors_and_not_where_they_lie(encoder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(BERT, copy)
    assert Encoder.load(copy, batch_tokens=77).digest == encoder.digest
    assert len(encoder.digest) == 64
    digests = {encoder.digest, Encoder.load(copy, max_tokens=31).digest, Encoder.load(copy, query_prefix="?").digest}
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if "model" in file else whole + b"\n")
        digests.add(Encoder.load(copy).digest)
        (copy / file).write_bytes(whole)
    assert len(digests) == 6


def test_few_programs_are_compiled(encoder):
    before = embed._vectors._cache_size()
    for count in range(1, 40):
        encoder.encode_queries(["river"] * count)
    assert embed._vectors._cache_size() - before <= 4  # 1, 4, 16, 64 rows of 16 tokens


def print_vectors() -> None:
    for path, mesh in ((BERT, make_mesh(2, 1)), (BERT, make_mesh(1, 2)), (QWEN3, make_mesh(2, 1))):
        print(json.dumps(Encoder.load(path, mesh=mesh).encode_passages(TEXTS).tolist()))


def test_two_devices_give_the_same(run_on_devices):
    found = [np.array(json.loads(line)) for line in run_on_devices(print_vectors, 2).splitlines()]
    for mine, path in zip(found, (BERT, BERT, QWEN3), strict=True):
        np.testing.assert_allclose(mine, Encoder.load(path).encode_passages(TEXTS), atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 2, 8])
@pytest.mark.parametrize("batch_tokens", [1, 100, 2048])
def test_a_plan_holds_every_text_once_in_rows_that_fit(multiple, batch_tokens):
    dice = np.random.default_rng(0)
    for count in (0, 1, 5, 17, 300):
        lengths = dice.integers(0, 500, count) // dice.integers(1, 30, count)
        batches = list(plan(lengths, batch_tokens, multiple))
        assert sorted(text for batch in batches for text in batch.texts) == list(range(count))
        for batch in batches:
            assert batch.num_rows % multiple == 0
            assert 0 < len(batch.texts) <= batch.num_rows
            assert lengths[batch.texts].max() <= batch.num_tokens == padded_length(int(lengths[batch.texts].max()))
            assert batch.num_rows * batch.num_tokens <= batch_tokens or batch.num_rows == multiple
            assert batch.num_rows <= 2 * multiple * -(-len(batch.texts) // multiple)
            assert (lengths[batch.texts] > batch.num_tokens // 2).all() or batch.num_tokens == 16


def test_lengths_are_multiples_of_16_and_few():
    lengths = [padded_length(length) for length in range(4097)]
    assert all(length <= padded and padded % 16 == 0 for length, padded in enumerate(lengths))
    assert all(padded - length < max(16, length / 4) for length, padded in enumerate(lengths) if length)
    assert len(set(lengths)) == 8 + 4 * 5


def test_what_cannot_work_is_one_line(encoder, tmp_path):
    with pytest.raises(ValueError, match="batch_tokens is 0: give a positive number"):
        Encoder.load(BERT, batch_tokens=0)
    with pytest.raises(ValueError, match="'qwen2-shards' is of no known family: give pooling= and normalize="):
        Encoder.load(FIXTURES / "qwen2-shards")
    copy = tmp_path / "copy"
    shutil.copytree(BERT, copy)
    shutil.copy(QWEN3 / "tokenizer.json", copy)
    with pytest.raises(ValueError, match="the tokenizer of copy has 290 tokens, its model 9"):
        Encoder.load(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        Encoder.load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"there is no tokenizer.json in .*copy: save the tokenizer as a fast one"):
        Encoder.load(copy)
    settings = dataclasses.replace(encoder.settings, end="<end>")
    with pytest.raises(ValueError, match="the tokenizer of x has no token '<end>'"):
        Encoder(encoder._params, encoder._architecture, encoder._tokenizer, settings, name="x", digest="")
