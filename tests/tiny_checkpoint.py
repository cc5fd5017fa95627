"""A small model in Hugging Face's form, with random weights and a tokenizer trained on a corpus:

    python -m tests.tiny_checkpoint --corpus=FILE --out=DIR

The architecture is Qwen2.5's (biases of queries, keys and values, tied head), the template ChatML's. It knows nothing;
it goes every way a published checkpoint goes.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import train_bpe
from rlrag.model.architecture import Architecture

END, PAD = "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_checkpoint(folder: Path, texts: Iterable[str], a: Architecture, *, seed: int = 0) -> None:
    """A whole folder: config.json, weights, tokenizer, template, generation settings. The model's vocabulary is `a`'s,
    the tokenizer's a little smaller, as published ones are padded."""
    import jax

    from rlrag.model.hf_export import export_model
    from rlrag.model.parameters import initialize

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|im_start|>", *Tags().strings]
    tokenizer = train_bpe(iter(texts), a.vocab_size - 8, special=special, end=END, pad=PAD)
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.end_id}))
    export_model(initialize(a, jax.random.key(seed)), a, folder, shard_bytes=2_000_000)


def main() -> None:
    from rlrag.retrieval.corpus import read_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    a = Architecture(
        vocab_size=4096, num_layers=3, embed_dim=192, num_heads=4, num_kv_heads=2, head_dim=48, mlp_dim=384,
        rope_theta=1e6, qkv_bias=True,
    )  # fmt: skip
    write_checkpoint(Path(given.out), (f"{p.title}\n{p.text}" for p in read_corpus(given.corpus)), a)
    print(f"{given.out}: {', '.join(sorted(file.name for file in Path(given.out).iterdir()))}")


if __name__ == "__main__":
    main()
