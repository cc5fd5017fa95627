"""How the bench speaks with contenders: each is a process in its own environment, a line of JSON a message.

A worker loads, warms up and says it is ready; then it answers every request with what it took. Between requests it
waits: one contender works at a time. Standard library alone: workers of all environments import it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Message = dict[str, Any]


class Channel:
    """A worker's end. Whatever libraries print goes to stderr: answers have stdout to themselves."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def wait(self) -> Message | None:
        """The next request; None when there will be none."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def serve(channel: Channel, work: Callable[[int], int], warm_up: int, **about: Any) -> None:
    """Answer requests by work(seed) -> new tokens, after `warm_up` calls that nobody times. about: told when ready."""
    for seed in range(warm_up):
        work(-1 - seed)
    channel.tell(ready=True, **about)
    while (request := channel.wait()) is not None:
        begin = time.perf_counter()
        tokens = work(request["seed"])
        channel.tell(seconds=time.perf_counter() - begin, tokens=tokens)


class Pace:
    """Paces a training loop that is not ours to drive: it calls `step_ended` after every step, which comes back when
    the next step is asked for."""

    def __init__(self, channel: Channel, warm_up: int, **about: Any):
        """warm_up: steps that nobody times, compilations among them. about: told when ready."""
        self._channel, self._warm_up, self._about = channel, warm_up, about
        self._ended = 0
        self._begin = time.perf_counter()

    def step_ended(self, tokens: int, **details: Any) -> bool:
        """Whether there is another step to do. tokens: that this one sampled. details: told beside the seconds."""
        seconds = time.perf_counter() - self._begin
        self._ended += 1
        if self._ended == self._warm_up:
            self._channel.tell(ready=True, **self._about)
        elif self._ended > self._warm_up:
            self._channel.tell(seconds=seconds, tokens=tokens, **details)
        more = self._ended < self._warm_up or self._channel.wait() is not None
        self._begin = time.perf_counter()
        return more


class Contender:
    """The bench's end: a worker process. A context manager; `log` takes what it prints."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ):  # fmt: skip
        self.name, self.log = name, log
        self._log: TextIO = log.open("w")
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment, cwd=directory,
        )  # fmt: skip

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end; a worker that is still there after some seconds is ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def hear(self) -> Message:
        """The next message. Raises ValueError, with the last lines of its log, where the worker has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = "\n".join(self.log.read_text().splitlines()[-12:])
            raise ValueError(f"{self.name} ended with status {self._process.returncode}: see {self.log}\n{last}")
        return json.loads(line)

    def ask(self, **request: Any) -> Message:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says why
        return self.hear()
