"""Parameters in the layout of Hugging Face: safetensors, read by name, one file or several with an index.

What tensors are called stands in families.py. A tensor is read, turned and placed alone, each device's part of it, so
that no second copy of the model is ever in memory; no torch, and no file that can run code (pickle) is opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from rlrag.mesh import sharding
from rlrag.model import bert, parameters
from rlrag.model.architecture import Architecture, EncoderArchitecture
from rlrag.model.families import Name, read_family, read_json
from rlrag.model.parameters import Leaf, Transformer, is_leaf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them
Index = tuple[slice, ...]


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model, in a fixed order: one, or the shards that the index names."""
    return sorted({file for file in _tensor_files(Path(folder)).values()})


def load_parameters(
    folder: str | Path, architecture: Architecture | EncoderArchitecture, *, mesh: Mesh | None = None
) -> Transformer | bert.Bert:
    """The parameters of a model in `architecture.param_dtype`, laid over `mesh` (None: on the default device).

    architecture is what `read_architecture` gave, or differs from it in dtypes, remat, `tied` (True: a head of its own
    is left unread) and the value head, which starts as it does in a new model.

    Raises ValueError, naming the tensor, where one is missing, has another shape than config.json tells or is
    quantised, and where the trunk holds one that the architecture does not read.
    """
    folder = Path(folder)
    family = read_family(folder)
    description: Any = (
        bert.describe(architecture)
        if isinstance(architecture, EncoderArchitecture)
        else parameters.describe(architecture)
    )
    leaves, tree = jax.tree_util.tree_flatten_with_path(description, is_leaf=is_leaf)
    checkpoint = _Checkpoint(folder, family.prefix)
    dtype = jnp.dtype(architecture.param_dtype)

    def load(path: Any, leaf: Leaf) -> jax.Array:
        place = jax.tree_util.keystr(path, simple=True, separator=".")
        where = SingleDeviceSharding(_default_device()) if mesh is None else sharding(mesh, leaf.axes, leaf.shape)

        def part(whole: Index | None) -> np.ndarray:
            assert whole is not None
            index = tuple(slice(*cut.indices(size)) for cut, size in zip(whole, leaf.shape, strict=True))
            return checkpoint.part(family.names.get(place), leaf, index, dtype)

        # Waited for: what the device copies from would pile up otherwise.
        return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, where, part))

    # The largest first: what a leaf needs on its way, a copy of itself, is then never beside a full memory.
    order = sorted(range(len(leaves)), key=lambda number: -np.prod(leaves[number][1].shape, dtype=np.int64))
    values = {number: load(*leaves[number]) for number in order}
    for name in checkpoint.unread():
        if name.startswith(family.rooms) and not name.endswith(("position_ids", "rotary_emb.inv_freq")):
            raise ValueError(
                f"{folder}: the tensor {name!r} is not part of the model that config.json tells: "
                "fetch both from the same place"
            )
    return jax.tree.unflatten(tree, [values[number] for number in range(len(leaves))])


def _default_device() -> Any:
    return jnp.zeros(()).devices().pop()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Where every tensor lies. Raises ValueError where there are no safetensors or a shard is missing."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ValueError(
            f"there is no {WEIGHTS} and no {INDEX} in {folder}: save the model as safetensors "
            "(save_pretrained of transformers does)"
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files: fetch it again")
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"{index} names the shard {shard!r}, which is not in {folder}: fetch it too")
    return {name: folder / shard for name, shard in table.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): fetch it again") from None


class _Checkpoint:
    """The tensors of a folder by their names without the prefix; knows which were read.

    A file is mapped for one tensor at a time, since what was read of a mapping counts as memory until it ends.
    """

    def __init__(self, folder: Path, prefix: str):
        self._folder, self._prefix = folder, prefix
        self._files = _tensor_files(folder)
        self._read: set[str] = set()

    def part(self, name: Name | None, leaf: Leaf, index: Index, dtype: Any) -> np.ndarray:
        """A part of a leaf, its layers read one after the other into their places; without a name its initial value."""
        value = np.empty([cut.stop - cut.start for cut in index], dtype)
        if name is None:
            assert leaf.stddev == 0, f"a leaf of {leaf.shape} has no name and no fixed initial value"
            value[...] = leaf.mean
        elif "{}" in name.template:
            for layer in range(index[0].start, index[0].stop):
                self._read_into(value[layer - index[0].start], name, layer, leaf.shape[1:], index[1:])
        else:
            self._read_into(value, name, 0, leaf.shape, index)
        return value

    def _read_into(self, target: np.ndarray, name: Name, layer: int, shape: tuple[int, ...], index: Index) -> None:
        own = name.template.format(layer)
        with self._tensor(own) as (file, tensor):
            there, wanted = list(tensor.get_shape()), list(shape[::-1] if name.turned else shape)
            if there != wanted:
                raise ValueError(
                    f"{file}: the tensor {own!r} has the shape {there}, config.json asks for {wanted}: "
                    "fetch both from the same place"
                )
            if tensor.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{file}: the tensor {own!r} is {tensor.get_dtype()}: give one of {', '.join(FLOATS.values())}"
                )
            target[...] = tensor[index[::-1]].T if name.turned else tensor[index]

    @contextmanager
    def _tensor(self, name: str) -> Iterator[tuple[Path, Any]]:
        """The file of a tensor, and the tensor, which is read as it is cut."""
        found = next((each for each in self._spellings(name) if each in self._files), None)
        if found is None:
            raise ValueError(
                f"{self._folder}: the tensor {name!r} is missing, with and without {self._prefix!r} before it: "
                "fetch the checkpoint again"
            )
        file = self._files[found]
        with _opened(file) as handle:
            try:
                tensor = handle.get_slice(found)
            except SafetensorError as error:
                raise ValueError(
                    f"{file}: the tensor {found!r} cannot be read ({error}): fetch the file again"
                ) from None
            yield file, tensor
        self._read.add(found)

    def unread(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in sorted(self._files.keys() - self._read))

    def _spellings(self, name: str) -> Iterator[str]:
        """With and without the prefix; norms of the first BERT checkpoints have a gamma and a beta."""
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for each in dict.fromkeys((name, old)):
            yield from (each, self._prefix + each)
