"""Episodes as JSON and back, exactly: arrays keep their type and every bit, dataclasses their fields.

A record never says which class to build: the reader does, so that nothing in a file chooses what code runs.
"""

import base64
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

ARRAY = "__array__"


def to_record(value: Any) -> Any:
    """Of dataclasses, mappings with text keys, sequences, arrays, text, numbers, None. ValueError names another type:
    the outcome fields of a workflow may hold anything else only if nothing saves them."""
    if isinstance(value, np.ndarray):
        return {ARRAY: [str(value.dtype), list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_record(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"a mapping with the keys {list(value)[:3]} cannot be saved: use text keys")
        return {key: to_record(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_record(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"a {type(value).__name__} cannot be saved with an episode: keep text, numbers, lists and mappings"
    )


def from_record(record: Any, like: Any) -> Any:
    """The value of type `like` that a record was made of. Where the type says nothing (Any), lists stay lists."""
    if isinstance(record, dict) and ARRAY in record:
        dtype, shape, data = record[ARRAY]
        return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
    origin, arguments = get_origin(like), get_args(like)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if record is None else from_record(record, inner[0] if len(inner) == 1 else Any)
    if isinstance(like, type) and dataclasses.is_dataclass(like):
        hints = get_type_hints(like)
        return like(**{name: from_record(item, hints[name]) for name, item in record.items()})
    if isinstance(record, dict):
        inner = arguments[1] if len(arguments) == 2 else Any
        return {key: from_record(item, inner) for key, item in record.items()}
    if isinstance(record, list):
        inner = arguments[0] if arguments else Any
        items = [from_record(item, inner) for item in record]
        return tuple(items) if origin is tuple or like is tuple else items
    return record
