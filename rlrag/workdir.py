"""The directory of a run: which configuration it belongs to, and what its finished run found.

config.json  metrics.jsonl  tensorboard/  checkpoints/  predictions_*.jsonl  curve.png  result.json (written last)
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrag import config

MOST_SHOWN = 5  # differences in a message


def open_workdir(directory: Path, experiment: config.Experiment) -> None:
    """Make the directory, or see that what is saved in it belongs to this configuration.

    Raises ValueError where it cannot be made or written, or holds the checkpoints of another configuration, which
    nothing may mix with. What was never saved binds nobody: a run that failed at its start can be mended and repeated.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"the workdir {directory} cannot be written ({error.strerror}): choose another --workdir"
        ) from None
    new, old = config.to_dict(experiment), read(directory / "config.json")
    # A run may go on over other devices: to rounding it is the same.
    changed = [] if old is None else [text for text in differences(old, new) if not text.startswith("mesh.")]
    if changed and holds_checkpoint(directory):
        shown = "; ".join(changed[:MOST_SHOWN]) + (
            f"; and {len(changed) - MOST_SHOWN} more" if changed[MOST_SHOWN:] else ""
        )
        raise ValueError(
            f"{directory} holds a run with another configuration ({shown}): give the same flags to go on with it, or "
            "another --workdir to begin anew"
        )


def holds_checkpoint(directory: Path) -> bool:
    return any(path.name.isdecimal() for path in (directory / "checkpoints").glob("*"))


def finished(experiment: config.Experiment) -> dict[str, Any]:
    """The result of the run that `warm_start` names. ValueError where it is not finished, or its policy is gone."""
    source = Path(experiment.warm_start)
    result = read(source / "result.json")
    if result is None or not holds_checkpoint(source):
        lacks = "finished run" if result is None else "checkpoint"
        raise ValueError(f"warm_start is {source}, which holds no {lacks}: name the --workdir of one that ended")
    path = experiment.model.adapters.path
    if path and result["config"]["model"].get("adapters", {}).get("rank"):
        raise ValueError(
            f"model.adapters.path is {path!r}, but {source}, which warm_start names, has adapters already: give one of "
            "them only"
        )
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every field in which two configurations differ, as text."""
    changed = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed.append(f"{prefix}{name} is {a!r} there and {b!r} now")
    return changed


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove the run, or put the file right") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: remove the run, or put the file right")
    return value


def write(path: Path, value: Mapping[str, Any]) -> None:
    """The file is the old one or the new one, whole, whenever the process ends."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
