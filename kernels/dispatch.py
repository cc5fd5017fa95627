"""Which implementation of an operation runs: by platform and shape, or the one the caller names.

Every operation has a table ``{name: Implementation}`` in order of preference. A new kernel is one more entry; nothing
else changes. An automatic choice takes, for each platform, the first entry that supports it and the shapes. Where
platforms differ, ``lax.platform_dependent`` decides at lowering, so that a program traced on one machine compiles
for another. A name the caller asked for, by argument or for all calls inside ``requesting``, is never replaced by
another: it runs, or ValueError says what exists. Inside ``interpret.interpreted()`` (tests) a name may be asked for on
a platform that it was not written for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax import lax

from kernels import interpret

PLATFORMS = ("cpu", "cuda", "tpu")

logger = logging.getLogger("kernels")
_chosen: dict[str, str] = {}
_logged: set[tuple] = set()
_requests: ContextVar[Mapping[str, str]] = ContextVar("requests", default=MappingProxyType({}))


def _supports_all(**shape: Any) -> str | None:
    return None


class Implementation(NamedTuple):
    """One way to compute an operation."""

    run: Any  # what the operation calls: a function, or a module holding several
    platforms: tuple[str, ...] = PLATFORMS  # where it can run
    automatic: tuple[str, ...] = PLATFORMS  # where it may be chosen without being named
    refuses: Callable[..., str | None] = _supports_all  # (**shape) -> why these shapes are not supported, or None


class Choice(NamedTuple):
    """The implementation of one call; hashable, so it may be a static argument."""

    default: str
    exceptions: tuple[tuple[str, str], ...] = ()  # (platform, name) where another implementation is better


def choose(operation: str, table: Mapping[str, Implementation], requested: str | None, **shape: Any) -> Choice:
    """The choice for this operation and these shapes; raises ValueError for a name that cannot run here."""
    platform = current_platform()
    requested = requested or _requests.get().get(operation)
    if requested is not None:
        choice = Choice(_explicit(operation, table, requested, platform, shape))
    else:
        names = {each: _first(operation, table, each, shape) for each in PLATFORMS}
        default = names[platform]
        choice = Choice(default, tuple((each, name) for each, name in names.items() if name != default))
    _log(operation, choice.default, platform, "requested" if requested else "automatic")
    return choice


@contextmanager
def requesting(**names: str) -> Iterator[None]:
    """Operation -> the implementation of all calls that are traced inside and name none; for code that calls an
    operation far below, as a model does. What was compiled before keeps its own."""
    token = _requests.set({**_requests.get(), **names})
    try:
        yield
    finally:
        _requests.reset(token)


def call(
    table: Mapping[str, Implementation], choice: Choice, member: Callable[[Any], Callable], *arguments: Any
) -> Any:
    """``member(table[name].run)(*arguments)`` for the chosen name of the platform the program is lowered for."""
    default = member(table[choice.default].run)
    if not choice.exceptions:
        return default(*arguments)
    others = {platform: member(table[name].run) for platform, name in choice.exceptions}
    return lax.platform_dependent(*arguments, default=default, **others)


def chosen() -> dict[str, str]:
    """Operation -> the implementation last chosen for it in this process, for the metrics."""
    return dict(_chosen)


def current_platform() -> str:
    """The platform of this process, in the words of ``lax.platform_dependent``."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def _explicit(operation: str, table: Mapping[str, Implementation], name: str, platform: str, shape: dict) -> str:
    if name not in table:
        raise ValueError(f"{operation} has no implementation {name!r}; there are {', '.join(table)}")
    entry = table[name]
    if platform not in entry.platforms and not interpret.active():
        able = [each for each, other in table.items() if platform in other.platforms]
        runs_on = ", ".join(entry.platforms)
        raise ValueError(f"{operation} {name!r} runs on {runs_on}, not on {platform}; here: {', '.join(able)}")
    reason = entry.refuses(**shape)
    if reason is not None:
        raise ValueError(f"{operation} {name!r} does not support this call: {reason}; there are {', '.join(table)}")
    return name


def _first(operation: str, table: Mapping[str, Implementation], platform: str, shape: dict) -> str:
    for name, entry in table.items():
        allowed = platform in entry.platforms and platform in entry.automatic
        if allowed and entry.refuses(**shape) is None:
            return name
    raise ValueError(f"{operation} has no implementation for {platform} with {shape}; there are {', '.join(table)}")


def _log(operation: str, name: str, platform: str, why: str) -> None:
    _chosen[operation] = name
    if (operation, name, platform, why) not in _logged:
        _logged.add((operation, name, platform, why))
        logger.info("%s: %s on %s (%s)", operation, name, platform, why)
