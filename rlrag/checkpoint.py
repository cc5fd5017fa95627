"""Saving and restoring a run, Orbax behind one file.

A checkpoint holds everything a resume needs: every model's train state, the stage's reference, and as JSON the stage,
the step, the data cursor, the number of metrics rows and the resolved configuration. Orbax writes to a temporary name
and renames, so a crash while saving leaves the previous checkpoint good.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, under `directory`; the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        self.directory = directory

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: Any) -> Any:
        """Arrays of a checkpoint in the tree, shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def close(self) -> None:
        self._manager.close()


def load_config(directory: Path) -> dict[str, Any]:
    """The resolved configuration beside a run's checkpoints."""
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no config.json: name the --workdir of a finished or running training")
    return json.loads(path.read_text())
