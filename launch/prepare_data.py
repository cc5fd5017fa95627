"""Turn questions in any published format into a TFDS dataset: array_record files read at random, without TensorFlow.

    python -m launch.prepare_data --data=hotpot_train_v1.1.json --name=hotpotqa --out=DIR
    python -m launch.prepare_data --data=train.jsonl --split=train --data=dev.jsonl --split=validation ...

Read it with `rlrag.data.sources.TfdsSource(NAME, split, data_dir=DIR)`, or with `tfds.data_source`. Records keep the
order of the file. Running it again on the same files does nothing; a run that was cut short leaves no dataset behind.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch.flags import Mistake, run
from rlrag.data.sources import read_examples, to_record

VERSION = "1.0.0"


def prepare(
    splits: Mapping[str, str | Path], name: str, out: str | Path, *, format: str | None = None, overwrite: bool = False
) -> Path:
    """Write the dataset and return its directory, OUT/NAME/1.0.0.

    splits: file by split name. The dataset is built beside its place and moved there when it is whole. Its metadata
    hold the digest of the files and the format: a dataset made from the same is left as it is.

    Raises ValueError for a bad file, row, name or split, and for a dataset of that name made from something else
    unless `overwrite`; OSError where a file is not there or the directory cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"dataset name is {name!r}: give small letters, digits and underscores, a letter first")
    for split in splits:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split):
            raise ValueError(f"split is {split!r}: give letters, digits and underscores, a letter first")
    out, digest = Path(out), _digest(splits, format)
    target = out / name / VERSION
    if target.exists():
        made_from = _read_digest(target)
        if made_from == digest:
            return target
        if not overwrite:
            raise ValueError(
                f"{target} was made from other files or another format: pass --overwrite or another --name"
            )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as directory:
        _build(splits, name, directory, format, digest)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        (Path(directory) / name / VERSION).rename(target)
    return target


def _build(splits: Mapping[str, str | Path], dataset: str, directory: str, format: str | None, digest: str) -> None:
    import tensorflow_datasets as tfds  # late: a wrong flag is told at once

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # a log wants lines, not a redrawn bar
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(globals()["VERSION"])

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Questions prepared by launch.prepare_data: one Example of rlrag a record.",
                features=tfds.features.FeaturesDict(
                    {
                        "id": text,
                        "question": text,
                        "answers": texts,
                        "hops": tfds.features.Scalar(np.int32, doc="-1: not known"),
                        "gold": texts,
                        "scope": text,
                        "fields_json": text,
                    }
                ),
                metadata=tfds.core.MetadataDict(digest=digest),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(path) for split, path in splits.items()}

        def _generate_examples(self, path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
            return ((row, to_record(example)) for row, example in enumerate(read_examples(path, format)))

    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces the temporary directory; its bars go to stderr
        Builder(data_dir=directory, file_format="array_record").download_and_prepare()


def _digest(splits: Mapping[str, str | Path], format: str | None) -> str:
    """SHA-256 of what the dataset is made from: split names, files and format."""
    total = hashlib.sha256(repr(format).encode())
    for split, path in splits.items():
        with open(path, "rb") as file:
            total.update(f"\n{split} {Path(path).name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return total.hexdigest()


def _read_digest(directory: Path) -> str | None:
    try:
        return json.loads((directory / "metadata.json").read_text()).get("digest")
    except (OSError, ValueError, AttributeError):
        return None  # not ours


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_multi_string("data", None, "File of questions; give it once for each split.", flag_values=values)
    flags.DEFINE_multi_string("split", ["train"], "Split that the file becomes; as many as --data.", flag_values=values)
    flags.DEFINE_string("name", None, "Name of the dataset: small letters, digits, underscores.", flag_values=values)
    flags.DEFINE_string("out", None, "TFDS data directory; the dataset goes to OUT/NAME/1.0.0.", flag_values=values)
    flags.DEFINE_string(
        "format",
        None,
        "Format of the rows (rlrag/data/formats.py); default: told from the first row.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace a dataset of that name that was made from other files.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    data, split = values.data, values.split
    if len(split) != len(data):
        raise Mistake(f"{len(data)} --data but {len(split)} --split: give one --split for each --data")
    if len(set(split)) != len(split):
        raise Mistake(f"--split is {', '.join(split)}: give each split one file")
    target = prepare(dict(zip(split, data)), values.name, values.out, format=values.format, overwrite=values.overwrite)
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(target).info
    counts = ", ".join(f"{split} {info.splits[split].num_examples}" for split in info.splits)
    print(f"{target}: {counts} questions; read it with TfdsSource({values.name!r}, data_dir={values.out!r})")


if __name__ == "__main__":
    run(
        main,
        define_flags,
        required={"data": "questions.json", "name": "hotpotqa", "out": "datasets"},
        doc=__doc__,
    )
