"""What a trained model says without its adapters, on episodes of its run:

    python -m tests.reference_check --workdir=RUN

Three times the same, bit by bit: the reference that the checkpoint holds (adapters that add nothing), the model with
its adapters taken away, and the model that the training began from; and how far the adapters have moved it.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlrag import config
from rlrag.batch import Batch
from rlrag.checkpoint import Checkpoints, load_config
from rlrag.convert import one_device, read_run
from rlrag.model.architecture import Architecture
from rlrag.model.folder import locate
from rlrag.model.parameters import Transformer, abstract, joined, learning, merged, part, plain
from rlrag.objectives.scoring import score
from rlrag.packing import Shape, empty_batch
from rlrag.setup import load_policy


class Said(NamedTuple):
    """Log-probs [R, T] of the tokens of a batch, and which of them the policy sampled."""

    sampled: np.ndarray
    reference: np.ndarray
    off: np.ndarray
    begun: np.ndarray
    on: np.ndarray


def say(directory: Path, most: int = 64) -> Said:
    """What the newest checkpoint of a run says of at most so many of its logged streams."""
    a, params = read_run(directory, "policy", False)
    batch = episodes(directory, most, len(a.adapters.listed))
    off = batch.replace(segments=batch.segments.replace(adapters=None))  # type: ignore[attr-defined]
    bare = params.replace(adapters=None)  # type: ignore[attr-defined]

    def told(params: Transformer, a: Architecture, batch: Batch) -> np.ndarray:
        return np.asarray(jax.jit(lambda params, batch: score(params, a, batch).logp)(params, batch))

    first, shape = begun(directory, a)
    return Said(
        np.asarray(batch.act) == 1,
        reference=told(joined(read_reference(directory, a), params), a, batch),
        off=told(bare, a, off),
        begun=told(first, shape, off),
        on=told(params, a, batch),
    )


def episodes(directory: Path, most: int, num_adapters: int) -> Batch:
    """The first streams that a run has logged, one a row, all by the first adapter."""
    lines = (directory / "episodes.jsonl").read_text().splitlines()[:most]
    streams = [stream["spans"] for line in lines for stream in json.loads(line)["streams"]]
    longest = max(sum(len(span["tokens"]) for span in spans) for spans in streams)
    shape = Shape(len(streams), longest, 2, 1, 0, 0, num_adapters)
    batch = jax.tree.map(lambda leaf: leaf[0], empty_batch(shape))
    for row, spans in enumerate(streams):
        tokens = np.concatenate([span["tokens"] for span in spans])
        batch.tokens[row, : len(tokens)], batch.segment[row, : len(tokens)] = tokens, 1
        batch.positions[row, : len(tokens)] = np.arange(len(tokens))
        batch.act[row, : len(tokens)] = np.repeat([span["act"] for span in spans], [len(s["tokens"]) for s in spans])
    if batch.segments.adapters is not None:
        batch.segments.adapters[:, 1, 0] = 1
    return batch


def read_reference(directory: Path, a: Architecture) -> Any:
    """What stands in the reference of the newest checkpoint in place of the parameters that learn."""
    checkpoints = Checkpoints(directory / "checkpoints")
    step = checkpoints.latest()
    checkpoints.close()
    trains = config.from_dict(load_config(directory)).main.update.trains
    item = {"reference": {"policy": part(abstract(a, one_device()), learning(a, trains))}}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = (directory / "checkpoints" / str(step) / "state").resolve()
        return reader.restore(folder, args=args)["reference"]["policy"]


def begun(directory: Path, a: Architecture) -> tuple[Transformer, Architecture]:
    """The model that a training began from, and its shape."""
    experiment = config.from_dict(load_config(directory))
    if experiment.warm_start:
        own, params = read_run(Path(experiment.warm_start), "policy", False)
        return (merged(params, own), plain(own)) if own != plain(own) else (params, own)
    return load_policy(locate(experiment.model.path), a, one_device()), plain(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    said = say(Path(parser.parse_args().workdir))
    where = said.sampled
    for name in ("off", "begun"):
        equal = np.array_equal(said.reference[where], getattr(said, name)[where])
        what = "with its adapters taken away" if name == "off" else "that it began from"
        print(f"the reference and the model {what}: {'equal bit by bit' if equal else 'DIFFERENT'}")
    moved = np.abs(said.on - said.reference)[where]
    print(
        f"{where.sum():,} sampled tokens; the adapters move a log-prob by {moved.mean():.3f}, {moved.max():.2f} at most"
    )


if __name__ == "__main__":
    main()
