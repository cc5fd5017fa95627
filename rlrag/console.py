"""Progress as a person reads it: a live bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # where output is not a terminal

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    console.print(text, markup=False)


class Bar:
    """Progress of one stage; `show` takes the numbers worth watching."""

    def __init__(self, name: str, total: int, done: int, progress: Progress | None):
        self.name, self.total, self.done = name, total, done
        self._progress = progress
        self._begin, self._first = time.monotonic(), done
        self._line_at = self._begin  # the first line comes early
        if progress:
            self._task = progress.add_task(name, total=total, completed=done, numbers="")

    def show(self, **numbers: str) -> None:
        """Advance by one."""
        self.done += 1
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        now = time.monotonic()
        if self._progress:
            self._progress.update(self._task, completed=self.done, numbers=text)
        elif now >= self._line_at or self.done == self.total:
            self._line_at = now + LINE_EVERY_S
            left = (now - self._begin) / max(1, self.done - self._first) * (self.total - self.done)
            say(f"{self.name} {self.done}/{self.total}  {text}  left {left:.0f} s")


@contextmanager
def bar(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A Bar for the length of a stage."""
    if not sys.stdout.isatty():
        yield Bar(name, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield Bar(name, total, done, progress)
