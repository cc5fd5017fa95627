"""A part of a file of questions, named in one string.

    FILE                                     all of it
    FILE?split=train&dataset=hotpotqa,musique    rows whose field is one of the values
    FILE?split=train&seed=0&skip=100             in an order drawn with seed 0, without the first 100
    FILE?split=train&seed=0&n=100                the first 100 of the same order: disjoint from the line above

Fields are those of the row (`dataset`, `split`, `type`, ...) and `hops`. Selection comes first, then the order, then
skip, then n. Without a seed the order is the file's. So one published file holds a training and a validation part
that never share a question.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from rlrag.data.sources import load_examples
from rlrag.trajectory import Example

NUMBERS = ("n", "skip", "seed")


def open_file(spec: str, format: str | None = None) -> Sequence[Example]:
    """The questions of `FILE` or `FILE?...` (see the module), in memory.

    Raises ValueError, with the remedy, for a file that is not there, an option that no row has, a value no row has, a
    number that is none, or a selection that leaves nothing; and what `read_examples` raises for the rows themselves.
    """
    path, _, query = (spec, "", "") if Path(spec).exists() or "?" not in spec else spec.rpartition("?")
    if not Path(path).is_file():
        what = "is a directory" if Path(path).is_dir() else "does not exist"
        raise ValueError(
            f"{path} {what} (seen from {Path.cwd()}): give a file of questions, as in --config.data.train=FILE or "
            "--data=FILE"
        )
    examples = load_examples(path, format)
    return _select(spec, examples, query) if query else examples


def _select(spec: str, examples: list[Example], query: str) -> list[Example]:
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise ValueError(f"{spec!r}: write FILE?field=value&n=100, with name=value pairs joined by &") from None
    numbers = {name: _number(spec, name, text) for name, text in options if name in NUMBERS}
    for name, text in options:
        if name not in NUMBERS:
            examples = _keep(spec, examples, name, text)
    if "seed" in numbers:
        examples = list(examples)
        random.Random(numbers["seed"]).shuffle(examples)
    skip, n = numbers.get("skip", 0), numbers.get("n", len(examples))
    chosen = examples[skip : skip + n]
    if not chosen:
        raise ValueError(f"{spec!r}: nothing is left of {len(examples)} questions after skip={skip} and n={n}")
    return chosen


def _number(spec: str, name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{spec!r}: {name} is {text!r}, give a whole number of at least 0")
    return int(text)


def _keep(spec: str, examples: list[Example], name: str, text: str) -> list[Example]:
    wanted = set(text.split(","))
    if name != "hops" and not any(name in example.fields for example in examples):
        names = dict.fromkeys(field for example in examples[:100] for field in example.fields if field != "paragraphs")
        raise ValueError(f"{spec!r}: no row has a field {name!r}; there are: {', '.join([*NUMBERS, 'hops', *names])}")
    values = [str(example.hops if name == "hops" else example.fields.get(name)) for example in examples]
    unknown = wanted - set(values)
    if unknown:
        there = sorted(set(values))
        shown = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
        raise ValueError(f"{spec!r}: no row has {name}={sorted(unknown)[0]}; there are: {shown}")
    return [example for example, value in zip(examples, values) if value in wanted]
