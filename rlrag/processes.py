"""The processes of one training, usually one a host: which one this is, and what they tell each other.

Arrays travel between devices inside compiled programs. What hosts must agree on beside them (how many micro-batches
there are, whether someone was asked to end, the rows of an evaluation) goes as JSON through the store of JAX's
coordination service. A collective on the devices would not do: every process must begin those in the same order, and
two threads of a training ask. launch/processes.py starts processes and joins them.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

Item = TypeVar("Item")

POLL_MS = 1000  # how long Python waits at a time: signals are handled in between

_told: dict[str, int] = defaultdict(int)  # topic -> how often it was gathered
_lock = threading.Lock()


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes what is written once: metrics, logs, results."""
    return index() == 0


def gather(topic: str, value: Any) -> list[Any]:
    """What every process says of a topic, in their order: `value` is this one's, anything that JSON holds.

    All processes must ask, equally often. Topics do not wait for each other, so each thread has its own. When a process
    is gone, JAX ends those that wait for it, or raises here: whichever is first.
    """
    if count() == 1:
        return [value]
    with _lock:
        number = _told[topic]
        _told[topic] += 1
    store = _store()
    store.key_value_set_bytes(_key(topic, number, index()), json.dumps(value).encode())
    found = [json.loads(_wait(store, _key(topic, number, other))) for other in range(count())]
    # Whoever has spoken now had read everything before: that may go.
    if number:
        store.key_value_delete(_key(topic, number - 1, index()))
    return found


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of what all have: a run of them, so that all parts in order are the whole. The first process,
    which writes, is never left without."""
    first, last = (-(-len(items) * number // count()) for number in (index(), index() + 1))
    return [items[number] for number in range(first, last)]  # not all can be sliced


def before(numbers: Sequence[int]) -> int:
    """The sum over the processes before this one of what each has counted."""
    return sum(numbers[: index()])


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does it, then the others: what it writes they read."""
    if not is_first():
        gather("first_alone", None)
    yield
    if is_first():
        gather("first_alone", None)


def _key(topic: str, number: int, process: int) -> str:
    return f"rlrag/{topic}/{number}/{process}"


def _store() -> Any:
    from orbax.checkpoint import multihost  # the one public way to the client of JAX's service

    return multihost.get_jax_distributed_client()


def _wait(store: Any, key: str) -> bytes:
    while True:
        try:
            return store.blocking_key_value_get_bytes(key, POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
