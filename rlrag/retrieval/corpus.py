"""Corpora: JSONL files in the published layouts, and the same passages kept beside an index, read as they are used.

A kept corpus is `passages.jsonl`, one row a line, and `passages.offsets`, where each line begins: int64, little endian,
without a header, so that both grow while a corpus is read and a build that was killed goes on where it stood.
"""

import gzip
import hashlib
import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.trajectory import Passage

PASSAGES, OFFSETS = "passages.jsonl", "passages.offsets"
FLUSH_EVERY = 8192  # passages between two moments at which a killed build may stand


class StoredPassages(Sequence[Passage]):
    """The passages of a directory, each read from the mapped file when asked for; reads share no state."""

    def __init__(self, directory: str | Path):
        """Raises ValueError where the directory holds none, or the files do not fit together."""
        directory = Path(directory)
        missing = [name for name in (PASSAGES, OFFSETS) if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{directory} holds no passages ({missing[0]} is missing): build the index again")
        size = (directory / PASSAGES).stat().st_size
        self._offsets = np.memmap(directory / OFFSETS, "<i8", "r")  # int64 [passages + 1]
        if not size or self._offsets[-1] != size:
            raise ValueError(
                f"{directory}: {PASSAGES} has {size} bytes and should have {int(self._offsets[-1])}: build it again"
            )
        with open(directory / PASSAGES, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return Passage(**json.loads(self._bytes[self._offsets[row] : self._offsets[row + 1]]))


def store(passages: Iterable[Passage], directory: Path) -> Iterator[int]:
    """Write passages into the directory, going on after those that it holds; yields how many it holds, now and then
    and at the end. Consume it to its end."""
    directory.mkdir(parents=True, exist_ok=True)
    lines, offsets = directory / PASSAGES, directory / OFFSETS
    for path in (lines, offsets):
        path.touch()
    starts = np.fromfile(offsets, "<i8", count=offsets.stat().st_size // 8)
    held = int(np.searchsorted(starts, lines.stat().st_size, side="right"))  # starts of lines that are whole
    starts = starts[: max(held, 1)] if held else np.zeros(1, "<i8")
    with open(lines, "r+b") as text, open(offsets, "r+b") as where:
        text.truncate(int(starts[-1]))
        where.truncate(0)
        starts.tofile(where)
        text.seek(0, 2)
        count, ends = len(starts) - 1, []
        for passage in islice(passages, count, None):
            fields = {"id": passage.id, "title": passage.title, "text": passage.text}
            text.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
            ends.append(text.tell())
            if len(ends) == FLUSH_EVERY:
                text.flush()  # first: an offset stands for a line that is whole
                np.array(ends, "<i8").tofile(where)
                where.flush()
                count, ends = count + len(ends), []
                yield count
        text.flush()
        np.array(ends, "<i8").tofile(where)
    yield count + len(ends)


def stored_digest(directory: Path) -> str:
    """SHA-256 of the stored passages."""
    with open(directory / PASSAGES, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a JSONL corpus, gzipped or not, one row a line in any published layout:

    `{"id", "title", "text"}` (BEIR: `_id`), or Search-R1's `{"id", "contents"}`, whose first line is the title in
    double quotes (taken off here: quotes are a matter of rendering) and whose rest is the text; contents of one
    unquoted line are all text. A row with both follows title and text. Other fields are passed over.

    Raises ValueError with file, line, fault and remedy for a row that is neither, and for an id that comes twice.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            passage = _parse_row(json.loads(line))
            if passage.id in seen:
                raise ValueError(f"id {passage.id!r} is also on line {seen[passage.id]}; give each passage its own")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); give one object a line") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        seen[passage.id] = number
        yield passage


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1, unpacked where the file is gzipped, whatever its name."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: damaged gzip data ({error}); fetch the file again") from None


def _parse_row(row: Any) -> Passage:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; give an object with id and contents, or id, title and text")
    id = row.get("id", row.get("_id"))
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"field 'id' is {id!r}; give a string or an integer")
    fields = ("title", "text") if "text" in row else ("contents",)
    for field in fields:
        if not isinstance(row.get(field), str):
            wanted = "contents, or title and text" if field not in row else "a string"
            raise ValueError(f"field {field!r} is {str(row.get(field))[:40]!r}; give {wanted}")
    if "text" in row:
        return Passage(str(id), row["title"], row["text"])
    return Passage(str(id), *split_contents(row["contents"]))


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text: the first line in double quotes, and the rest; contents of one unquoted line are all text."""
    first, _, rest = contents.partition("\n")
    quoted = len(first) >= 2 and first[0] == first[-1] == '"'
    if not rest and not quoted:
        return "", first
    return (first[1:-1] if quoted else first), rest
