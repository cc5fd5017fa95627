"""Rows of a data file: JSON lines, a JSON list, either of them gzipped, or parquet, told apart by the first bytes.

Nothing here knows what the rows mean (`formats`), and nothing in a file is ever executed: no pickle.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with their places in words ("line 3"), whatever they turn out to be.

    Raises ValueError naming file, place, fault and remedy; OSError where the file is not there.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from _read_parquet(path)
        return
    try:
        opened = gzip.open if magic[:2] == b"\x1f\x8b" else open
        with opened(path, "rt", encoding="utf-8-sig") as text:
            yield from _read_json(path, cast(TextIO, text))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip data ({error}); fetch the file again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither UTF-8 text nor parquet ({error.reason}); convert it to JSON lines") from None


def _read_json(path: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            try:
                rows = json.loads(line + text.read())
            except json.JSONDecodeError as error:
                where = number - 1 + error.lineno
                raise ValueError(f"{path}, line {where}: not JSON ({error.msg}); give a JSON list") from None
            yield from ((f"row {row}", value) for row, value in enumerate(rows, 1))
            return  # the list was the whole file
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); give one object a line") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # late: 0.1 s, and few files are parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged parquet ({str(error).splitlines()[0]}); fetch the file again") from None
