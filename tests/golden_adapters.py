"""What peft says about adapters of small decoders: python -m tests.golden_adapters [--check]

Writes tests/fixtures/decoders/qwen2-adapter: an adapter as peft saves it, and the logits of the model that has it. With
--check nothing is written: adapters that rlrag exports are loaded by peft, adapters that peft saves are read by rlrag,
and both say the same. `make parity` runs it, as tests/golden_decoders.py.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from rlrag.mesh import make_mesh
from rlrag.model.architecture import Adapters, Architecture
from rlrag.model.families import read_architecture
from rlrag.model.hf_export import export_model
from rlrag.model.parameters import Transformer, merged, plain
from rlrag.model.peft import export_adapter
from rlrag.setup import furnish, load_policy
from tests.decoders import ADAPTER, FIXTURES, PROMPTS
from tests.model.rehearsal import padded_logits

# Biases and one table; a head of its own, in several files; norms, windows and a scale of Gemma's; windows.
FAMILIES = ("qwen2", "llama3", "gemma3", "qwen2-windows")
OURS = Adapters(rank=3, alpha=5.0, names="one,two", rows=4)
THEIRS = Adapters(rank=2, alpha=7.0, targets="query,value,down", dropout=0.1, rows=4)  # as in `saved`
MOST, LEAST = 1e-4, 0.1  # logits apart: of the same model, of the model with an adapter and without


def tokens_of(vocab_size: int) -> np.ndarray:
    """Prompts in which the newest rows are read too."""
    tokens = np.random.default_rng(7).integers(3, vocab_size, (len(PROMPTS), max(PROMPTS))).astype(np.int32)
    tokens[:, 1:3] = vocab_size - 4, vocab_size - 1
    return tokens


def built(folder: Path, adapters: Adapters) -> tuple[Transformer, Architecture]:
    """A decoder of the fixtures with adapters, as a training begins with it."""
    a, mesh = read_architecture(folder), make_mesh(devices=jax.devices()[:1])
    assert isinstance(a, Architecture)
    a = replace(a, adapters=adapters)
    return furnish(load_policy(folder, a, mesh), a, mesh, jax.random.key(0)), a


def spoken(params: Transformer) -> Transformer:
    """Adapters that say something."""
    leaves, tree = jax.tree.flatten(params.adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return params.replace(adapters=jax.tree.unflatten(tree, leaves))  # type: ignore[attr-defined]


# -- torch ------------------------------------------------------------------------------------------------------------


def base_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(os.path.relpath(folder), attn_implementation="eager")


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    mask = np.arange(tokens.shape[1]) < np.array(PROMPTS)[:, None]
    with torch.inference_mode():
        out = model.eval()(torch.tensor(tokens * mask).long(), attention_mask=torch.tensor(mask).long())
    return out.logits.numpy() * mask[..., None].astype(np.float32)


def saved(folder: Path, to: Path) -> np.ndarray:
    """An adapter with random numbers as peft saves it; the logits of the model that has it."""
    import peft
    import torch

    model = base_of(folder)
    vocabulary = model.config.vocab_size
    newest, tied = list(range(vocabulary - 4, vocabulary)), model.config.tie_word_embeddings
    config = peft.LoraConfig(
        r=2, lora_alpha=7, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        trainable_token_indices=newest if tied else {"embed_tokens": newest, "lm_head": newest},
    )  # fmt: skip
    torch.manual_seed(3)  # of what peft draws itself
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    adapted.save_pretrained(to)
    (to / "README.md").unlink(missing_ok=True)
    told = json.loads((to / "adapter_config.json").read_text())
    told["target_modules"].sort()  # a set, in another order in every process
    (to / "adapter_config.json").write_text(json.dumps(told, indent=2, sort_keys=True))
    return logits(adapted, tokens_of(vocabulary))


def write() -> None:
    import peft

    shutil.rmtree(ADAPTER, ignore_errors=True)
    tokens = tokens_of(read_architecture(FIXTURES / "qwen2").vocab_size)
    found = {"tokens": tokens, "logits": saved(FIXTURES / "qwen2", ADAPTER)}
    save_file(found, ADAPTER / "expected.safetensors")
    (ADAPTER / "versions.json").write_text(json.dumps({"peft": peft.__version__}) + "\n")
    print(f"{sum(file.stat().st_size for file in ADAPTER.iterdir()):8} bytes in {ADAPTER.name}")


# -- both -------------------------------------------------------------------------------------------------------------


def check() -> bool:
    """Exports in peft and in transformers, and what peft wrote in rlrag, for every family; one line each."""
    import peft

    right = True

    def compare(what: str, mine: np.ndarray, wanted: np.ndarray, base: np.ndarray) -> None:
        nonlocal right
        apart, moved = float(np.abs(mine - wanted).max()), float(np.abs(wanted - base).max())
        good = apart <= MOST and moved >= LEAST
        right &= good
        print(f"{what}: {apart:.1e}, at most {MOST:.0e}; {moved:.2f} from the base{'' if good else ': WRONG'}")

    def peft_of(folder: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
        return logits(peft.PeftModel.from_pretrained(base_of(folder), adapter), tokens)

    for name in FAMILIES:
        folder = FIXTURES / name
        params, a = built(folder, OURS)
        params, tokens = spoken(params), tokens_of(a.vocab_size)
        base = logits(base_of(folder), tokens)
        for number, adapter in enumerate(a.adapters.listed):
            coefficients: Sequence[float] = np.eye(2)[number].tolist()
            mine = padded_logits(params, a, tokens, coefficients)
            with tempfile.TemporaryDirectory() as made:
                export_adapter(params, a, adapter, Path(made), base=str(folder))
                compare(f"{name}: our adapter {adapter} in peft", mine, peft_of(folder, Path(made), tokens), base)
            with tempfile.TemporaryDirectory() as made:
                export_model(merged(params, a, adapter), plain(a), Path(made), source=folder, shard_bytes=5000)
                whole = logits(base_of(Path(made)), tokens)
                compare(f"{name}: our adapter {adapter} merged, in transformers", mine, whole, base)
        with tempfile.TemporaryDirectory() as made:
            wanted = saved(folder, Path(made))
            params, a = built(folder, replace(THEIRS, path=made))
            compare(f"{name}: an adapter of peft, in rlrag", padded_logits(params, a, tokens, [1.0]), wanted, base)
    expected = load_file(ADAPTER / "expected.safetensors")
    wanted = peft_of(FIXTURES / "qwen2", ADAPTER, expected["tokens"])
    base = logits(base_of(FIXTURES / "qwen2"), expected["tokens"])
    compare("the adapter of the fixtures, now and when saved", expected["logits"], wanted, base)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if check() else 1)
    write()


if __name__ == "__main__":
    main()
