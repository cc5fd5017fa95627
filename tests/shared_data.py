"""Where the real data lie: $RLRAG_SHARED_DATA, else ../shared/data beside the repository.

Tests that read them are parametrised over what is there, on top of the fixtures of our own in tests/fixtures, so
nothing is skipped when they are absent: there are just fewer cases.
"""

import gzip
import json
import os
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("RLRAG_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")


def present(*names: str) -> list[Path]:
    """Those of the named shared files that exist, as paths."""
    return [SHARED / name for name in names if (SHARED / name).exists()]


def read_json(path: Path):
    """The JSON value of a file, or of every line of a .jsonl file; .gz is unpacked."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)
