"""What torch says about small decoders: python -m tests.golden_decoders [--check]

Writes tests/fixtures/decoders: checkpoints with random weights as transformers saves them, and what it makes of them;
the fast tests read both. With --check nothing is written: what is there is computed anew, by torch and by rlrag, and
compared; and what rlrag exports is loaded by transformers. `make parity` runs it in a virtual environment
of its own, since torch is no dependency of rlrag.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.decoders import CHECKPOINTS, CONTINUED, FIXTURES, PROMPTS, Checkpoint


def make(folder: Path, checkpoint: Checkpoint, seed: int) -> None:
    """Save a model with weights large enough for everything to count, norms and biases too."""
    import torch
    import transformers

    config = getattr(transformers, f"{checkpoint.family}Config")(**checkpoint.config)
    family = checkpoint.family.removesuffix("Text")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            norm = "norm" in name and family != "Gemma3"
            weight.copy_(noise * 0.3 + 1 if norm else noise * (0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.save_pretrained(folder, max_shard_size=checkpoint.shard)


def expected(folder: Path) -> dict[str, np.ndarray]:
    """What torch makes of a saved checkpoint: logits of right-padded prompts, the greedy continuation of each from its
    cache, and the logits of every token of it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    dice = np.random.default_rng(7)
    tokens = dice.integers(3, model.config.vocab_size, (len(PROMPTS), max(PROMPTS))).astype(np.int32)
    mask = np.arange(max(PROMPTS)) < np.array(PROMPTS)[:, None]
    continued, cached = [], []
    with torch.inference_mode():
        padded = model(torch.tensor(tokens).long() * torch.tensor(mask), attention_mask=torch.tensor(mask).long())
        for row, length in zip(tokens, PROMPTS, strict=True):
            fed, past, ids = torch.tensor(row[None, :length]).long(), None, []
            for _ in range(CONTINUED):
                out = model(fed, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[0, -1]
                ids.append(int(logits.argmax()))
                cached.append(logits.numpy())
                fed = torch.tensor([[ids[-1]]])
            continued.append(ids)
    return {
        "tokens": tokens,
        "logits": padded.logits.numpy() * mask[..., None].astype(np.float32),
        "continued": np.array(continued, np.int32),
        "cached": np.array(cached, np.float32).reshape(len(PROMPTS), CONTINUED, -1),
    }


def write() -> None:
    for seed, checkpoint in enumerate(CHECKPOINTS):
        folder = FIXTURES / checkpoint.name
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, checkpoint, seed)
        found = expected(folder)
        save_file(found | {"cached": found["cached"].max(-1)}, folder / "expected.safetensors")
        ranked = np.sort(found["cached"], -1)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        lead = (ranked[..., -1] - ranked[..., -2]).min()
        print(f"{size:8} bytes in {folder.name}; smallest lead of a greedy token {lead:.1e}")
    (FIXTURES / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {module.__name__: module.__version__.partition("+")[0] for module in (torch, transformers)}


def check() -> bool:
    """Torch anew against the fixtures, rlrag against torch, and rlrag's exports in transformers; one line each."""
    from rlrag.model.families import read_architecture
    from rlrag.model.hf import load_parameters
    from rlrag.model.hf_export import export_model
    from tests.model.rehearsal import cached_logits, padded_logits

    right = True

    def compare(what: str, mine: np.ndarray, wanted: np.ndarray, most: float) -> None:
        nonlocal right
        apart = float(np.abs(mine - wanted).max()) if mine.shape == wanted.shape else float("inf")
        right &= apart <= most
        print(f"{what}: {apart:.1e}, at most {most:.0e}{'' if apart <= most else ': WRONG'}")

    for checkpoint in CHECKPOINTS:
        folder, name = FIXTURES / checkpoint.name, checkpoint.name
        live, saved = expected(folder), load_file(FIXTURES / checkpoint.name / "expected.safetensors")
        compare(f"{name}: torch now and when saved", live["logits"], saved["logits"], 1e-5)
        a = read_architecture(folder)
        params = load_parameters(folder, a)
        compare(f"{name}: logits of padded prompts", padded_logits(params, a, live["tokens"]), live["logits"], 1e-4)
        ids, logits = cached_logits(params, a, live["tokens"])
        compare(f"{name}: {CONTINUED} greedy tokens", ids, live["continued"], 0)
        compare(f"{name}: logits of cached decoding", logits, live["cached"], 1e-4)
        with tempfile.TemporaryDirectory() as made:
            export_model(params, a, Path(made), shard_bytes=5000)
            again = expected(Path(made))
            compare(f"{name}: the export in transformers", again["logits"], live["logits"], 1e-6)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if check() else 1)
    write()


if __name__ == "__main__":
    main()
