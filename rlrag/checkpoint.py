"""Saving and restoring a run, Orbax behind one file.

A checkpoint holds everything a resume needs: every model's parameters, optimizer state and reference, and as JSON the
stage, the step, the data cursor, episodes played ahead and the number of metrics rows. The resolved configuration lies
beside the checkpoints. Orbax writes to a temporary name and renames, so a crash while saving leaves the previous
checkpoint good.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

PARAMETERS = "parameters"  # in the folder of a model that launch.convert wrote


class Checkpoints:
    """The checkpoints of one run, under `directory`; the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        self.directory = directory

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        """One more checkpoint; `step` must be greater than the latest's. ValueError where it cannot be written."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax raises many kinds, of which a full disk is the usual cause
            good = self.latest()
            kept = f"checkpoint {good} stays good" if good is not None else "there is none yet"
            raise ValueError(
                f"checkpoint {self.directory / str(step)} cannot be written ({first_line(error)}): {kept}; make room "
                f"({free_space(self.directory)} free), then the same command goes on"
            ) from error

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays. ValueError where a checkpoint cannot be read, here and below."""
        with self._told(step):
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: Any) -> Any:
        """Arrays of a checkpoint in the tree, shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with self._told(step):
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]

    def restore_params(self, step: int, like: Any, model: str = "policy") -> Any:
        """A model's parameters alone, in the tree, shapes and shardings of `like`; what else there is stays on disk."""
        item = {"params": {model: jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        # A reader of its own: the manager reads `state` in one way for life, the way it was first saved or restored.
        with self._told(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.directory.resolve() / str(step) / "state", args=args)["params"][model]

    def shapes(self, step: int, model: str = "policy") -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of a model, by its path in the tree."""
        with self._told(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(self.directory.resolve() / str(step) / "state").item_metadata.tree["params"]
            if model not in tree:
                raise ValueError(f"there is no model {model!r}, but {', '.join(tree)}")
            leaves = jax.tree_util.tree_leaves_with_path(tree[model])
            return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Whatever Orbax raises while it reads, in one line with a remedy."""
        try:
            yield
        except Exception as error:
            reason = first_line(error)
            others = [other for other in self._manager.all_steps() if other < step]
            remedy = f"remove it to go on from step {max(others)}" if others else "remove it to begin anew"
            raise ValueError(f"checkpoint {self.directory / str(step)} cannot be read ({reason}): {remedy}") from error

    def close(self) -> None:
        self._manager.close()


def save_parameters(folder: Path, params: Any) -> None:
    """A model's parameters alone, under `folder`: each leaf in parts that many processes can read at once."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.resolve() / PARAMETERS, params, force=True)


def restore_parameters(folder: Path, like: Any) -> Any:
    """What save_parameters wrote, in the shapes, dtypes and shardings of `like`. ValueError where it cannot be read."""
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder.resolve() / PARAMETERS, like)
    except Exception as error:
        raise ValueError(
            f"{folder / PARAMETERS} cannot be read ({first_line(error)}): convert the model again"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def free_space(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 2**20:,.0f} MiB"


def digest(params: Any) -> str:
    """SHA-256 of every parameter's name, dtype, shape and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for value in [leaf] if getattr(leaf, "is_fully_addressable", True) else whole_parts(leaf):
            total.update(np.asarray(jax.device_get(value)).tobytes())
    return total.hexdigest()


def whole_parts(leaf: jax.Array) -> Iterator[jax.Array]:
    """An array of several processes piece by piece, each whole on every device: a layer at a time fits."""
    assert isinstance(leaf.sharding, NamedSharding)
    whole = jax.jit(
        lambda x, number: x[number] if x.ndim > 2 else x,
        out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()),
    )
    for number in range(leaf.shape[0] if leaf.ndim > 2 else 1):
        yield whole(leaf, number)


def load_config(directory: Path) -> dict[str, Any]:
    """The resolved configuration beside a run's checkpoints."""
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no config.json: name the --workdir of a finished or running training")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): put it right, or name another training") from None
