"""Host memory while a checkpoint is loaded: python -m tests.load_memory [--dir=DIR]

Writes random bfloat16 shards of Qwen2.5-1.5B's shape, loads them in a process of their own, and compares the largest
resident size, less what it was before, with the bytes of the tensors. On a CPU device memory is host memory, so that
loading cannot take less than 1.0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1.3
CONFIG = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def write(folder: Path) -> None:
    """Shards of random tensors, of 1 GB each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rlrag.model.families import FAMILIES, read_architecture
    from rlrag.model.hf import INDEX
    from rlrag.model.hf_export import cut
    from rlrag.model.parameters import describe, is_leaf

    (folder / "config.json").write_text(json.dumps(CONFIG))
    leaves, _ = jax.tree_util.tree_flatten_with_path(describe(read_architecture(folder)), is_leaf=is_leaf)
    dice, family = np.random.default_rng(0), FAMILIES["qwen2"]

    def random() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in leaves:
            name = family.names[jax.tree_util.keystr(path, simple=True, separator=".")]
            stacked = "{}" in name.template
            shape = leaf.shape[1:] if stacked else leaf.shape
            for layer in range(leaf.shape[0] if stacked else 1):
                block = dice.standard_normal(shape[::-1] if name.turned else shape, np.float32)
                yield family.prefix + name.template.format(layer), np.asarray(block, jnp.bfloat16)

    weight_map = {}
    for file, names, _ in cut(random(), 1_000_000_000, folder):
        weight_map |= dict.fromkeys(names, file.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def kibibytes(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def measure(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from rlrag.model.families import read_architecture
    from rlrag.model.hf import load_parameters

    jnp.zeros(8).block_until_ready()
    before = kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size counts from here
    begun = time.perf_counter()
    params = jax.block_until_ready(load_parameters(folder, read_architecture(folder, param_dtype="bfloat16")))
    seconds = time.perf_counter() - begun
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    ratio = (kibibytes("VmHWM") - before) * 1024 / size
    print(f"{size / 1e9:.2f} GB in {seconds:.1f} s; at most {ratio:.3f} of it in memory, {LIMIT} allowed")
    sys.exit(0 if ratio <= LIMIT else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="where the shards are written and kept; a temporary folder otherwise")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(Path(given.measure))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.safetensors.index.json").is_file():
            write(folder)
        sys.exit(subprocess.run([sys.executable, "-m", "tests.load_memory", f"--measure={folder}"]).returncode)


if __name__ == "__main__":
    main()
