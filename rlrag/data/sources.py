"""Questions from files and TFDS datasets as random-access sequences of Examples, and the order they are drawn in.

Anything with `__len__` and `__getitem__` is a source: a file of a published format, a dataset prepared with TFDS, a
world that makes its questions up. Grain gives them order, shards and a cursor.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rlrag.data.files import read_rows
from rlrag.data.formats import clean_answers, detect_format, parse_row
from rlrag.trajectory import Example, Passage

if TYPE_CHECKING:
    import grain


def read_examples(path: str | Path, format: str | None = None) -> Iterator[Example]:
    """Examples of a file, in its order: JSON list, JSON lines (either gzipped) or parquet, told apart by content.

    format: a name of `formats.PARSERS`; None takes the format of the first row. Rows without an id are named after
    the file and their number. Raises ValueError with file, row, fault and remedy; OSError where the file is not there.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(read_rows(path)):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}; give an object with the question's fields")
            format = format or detect_format(row)
            example = parse_row(row, format, f"{stem}-{number}")
            if example.id in seen:
                raise ValueError(f"id {example.id!r} is also in {seen[example.id]}; give each question its own")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}, {place}: {_fault(error, format)}") from None
        seen[example.id] = place
        yield example
    if not seen:
        raise ValueError(f"{path}: holds no questions; give a file with at least one row")


def load_examples(path: str | Path, format: str | None = None) -> list[Example]:
    """All examples of a file (see `read_examples`), in memory. For more than memory holds: launch.prepare_data."""
    return list(read_examples(path, format))


class FileSource(Sequence[Example]):
    """A file of questions as a source. It is read once, into memory."""

    def __init__(self, path: str | Path, format: str | None = None):
        self.path = Path(path)
        self._examples = load_examples(path, format)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: Any) -> Any:
        return self._examples[row]


class TfdsSource(Sequence[Example]):
    """A split of a dataset prepared with TFDS, read at random from its array_record files; TensorFlow is not needed.

    dataset: a name ("squad", "trivia_qa/rc"; looked up in data_dir, or TFDS's own directory), or the directory of one
      prepared dataset (the one that holds dataset_info.json).
    split: a TFDS split, slices included ("train[:10%]").
    question_field, answers_field, id_field: where to find them in datasets that launch.prepare_data did not write;
      "answers/text" goes into nested features. Rows without an id are named after split and number.

    Raises ValueError where the dataset, split or fields are not there, or its files cannot be read at random.
    """

    def __init__(
        self,
        dataset: str | Path,
        split: str = "train",
        *,
        data_dir: str | Path | None = None,
        question_field: str = "question",
        answers_field: str = "answers",
        id_field: str = "id",
    ):
        self._name, self._split = str(dataset), split
        self._fields = (question_field, answers_field, id_field)
        self._rows = _open_tfds(self._name, split, data_dir)
        if len(self._rows):
            self[0]  # a wrong field name is told now and not in the middle of a run

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = row.__index__()
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        record = cast(dict[str, Any], _plain(self._rows[number]))
        try:
            return self._example(record, number)
        except ValueError as error:
            raise ValueError(f"TFDS dataset {self._name}, split {self._split}, row {number}: {error}") from None

    def _example(self, record: dict[str, Any], number: int) -> Example:
        question_field, answers_field, id_field = self._fields
        if "fields_json" in record:
            return _from_record(record)
        question = _lookup(record, question_field, "question_field")
        answers = clean_answers(_lookup(record, answers_field, "answers_field"))
        used = {name.split("/")[0] for name in self._fields}
        return Example(
            id=str(record.get(id_field, f"{self._split}-{number}")),
            question=str(question).strip(),
            answers=answers,
            fields={name: value for name, value in record.items() if name not in used},
        )


def iterate(
    source: Sequence[Example],
    *,
    seed: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = True,
    shuffle: bool = True,
) -> "grain.DatasetIterator[list[Example]]":
    """Batches of a source as a Grain iterator: lists of batch_size examples.

    Every epoch is a fresh permutation that depends on seed and epoch only. The endless sequence of all epochs is dealt
    out in turn to the shards, shard = (this one, how many), so together they draw every example once an epoch and stay
    level however the source divides. Without repeat the last batch may be short, and shards may end one batch apart.

    The cursor: `get_state()` is a small JSON-serialisable dict and `set_state(state)` goes on exactly there. It is a
    position only: source, seed, batch_size and shard must be the same, so save the configuration beside it.
    Reading is in the calling thread, without read-ahead: 20,000 rows a second are enough, and a world's questions
    should not be made up before they are asked for.
    """
    index, count = shard
    if not len(source):
        raise ValueError("the source holds no examples: give at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    if not 0 <= index < count:
        raise ValueError(f"shard is {index} of {count}: give 0 <= index < count")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give a whole number of at least 0")
    import grain  # late: 1.7 s

    dataset = grain.MapDataset.source(source)
    if shuffle:
        # Grain's epochs take seed, seed + 1, ...: spread, so that neighbouring seeds do not share epochs.
        dataset = dataset.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    if repeat:
        # In effect for ever. (Grain's own endless repeat has length 2**63 - 1, which its batches of 1 overflow.)
        dataset = dataset.repeat(max(1, 2**52 // len(source)))
    batches = dataset[index::count].batch(batch_size, batch_fn=list)
    return iter(batches.to_iter_dataset(read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def to_record(example: Example) -> dict[str, Any]:
    """An example as the flat record that launch.prepare_data writes; `TfdsSource` turns it back into an equal one.

    hops -1 and scope "" stand for None. Fields travel as JSON: tuples come back as lists.
    """
    fields = dict(example.fields)
    if "paragraphs" in fields:
        fields["paragraphs"] = [{"id": p.id, "title": p.title, "text": p.text} for p in fields["paragraphs"]]
    return {
        "id": example.id,
        "question": example.question,
        "answers": list(example.answers),
        "hops": -1 if example.hops is None else example.hops,
        "gold": list(example.gold),
        "scope": example.scope or "",
        "fields_json": json.dumps(fields, ensure_ascii=False, default=str),
    }


def _from_record(record: Mapping[str, Any]) -> Example:
    fields = json.loads(record["fields_json"])
    if "paragraphs" in fields:
        fields["paragraphs"] = [Passage(**paragraph) for paragraph in fields["paragraphs"]]
    return Example(
        id=record["id"],
        question=record["question"],
        answers=tuple(record["answers"]),
        hops=None if record["hops"] < 0 else record["hops"],
        gold=tuple(record["gold"]),
        scope=record["scope"] or None,
        fields=fields,
    )


def _open_tfds(name: str, split: str, data_dir: str | Path | None) -> Any:
    import tensorflow_datasets as tfds  # late: 0.2 s

    try:
        if (Path(name) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
            if not builder.is_prepared():
                raise ValueError(
                    f"TFDS dataset {name!r} is not prepared in {builder.data_dir}: run download_and_prepare with "
                    "file_format='array_record' there"
                )
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"there is no TFDS dataset {name!r} in {data_dir or 'the default data directory'}: prepare it with "
            "launch.prepare_data or TFDS, or give the directory that holds its dataset_info.json"
        ) from None
    file_format: Any = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"TFDS dataset {name!r} holds {file_format.value} files, which cannot be read at random: prepare it again "
            "with file_format='array_record'"
        )
    try:
        return cast(Any, builder).as_data_source(split)
    except ValueError as error:
        raise ValueError(f"TFDS dataset {name!r}, split {split!r}: {str(error).splitlines()[0]}") from None


def _lookup(record: Mapping[str, Any], path: str, parameter: str) -> Any:
    value: Any = record
    for part in path.split("/"):
        if isinstance(value, list):  # a sequence of features
            value = [item.get(part) for item in value]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            names = ", ".join(value) if isinstance(value, Mapping) else "no fields of its own"
            raise ValueError(f"there is no {path!r} among {names}; name the right one with {parameter}=")
    return value


def _plain(value: Any) -> Any:
    """TFDS's bytes, numpy scalars and arrays of either as str, Python numbers and lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _fault(error: Exception, format: str | None) -> str:
    """One line; a row whose values are of other types than the format's says so."""
    if isinstance(error, ValueError):
        return str(error)
    return f"not of the layout of format {format!r} ({type(error).__name__}: {error}); name another format"
