"""A user's own function, named in a configuration: module:function, file.py:function, or the function itself."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(field: str, spec: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that a field of the configuration names. Modules are found from the current directory too.

    Raises ValueError naming the field, its value and what is wrong.
    """
    if not isinstance(spec, str):
        return spec
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"{field} is {spec!r}: name module:function, or file.py:function")
    try:
        module = _load_file(place) if place.endswith(".py") else _load_module(place)
        function = getattr(module, name)
    except Exception as error:  # importing runs the user's code: whatever comes out of it is theirs to mend
        raise ValueError(
            f"{field} is {spec!r}, which cannot be loaded ({type(error).__name__}: {error}): name module:function"
        ) from error
    if not callable(function):
        raise ValueError(f"{field} is {spec!r}, a {type(function).__name__}: name a function")
    return function


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
