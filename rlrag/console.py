"""Progress as a person reads it: a live bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

LINE_EVERY_S = 10.0  # where output is not a terminal
WIDE = 120  # columns of a terminal in which a bar finds room beside the numbers
WATCHED = ("nll", "reward", "EM", "F1", "held-out EM", "tokens/s", "searches")  # in this order

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    console.print(text)


class Bar:
    """Progress of one stage; `show` takes those of WATCHED that are known."""

    def __init__(self, name: str, total: int, done: int, progress: Progress | None, first_line_s: float):
        self.name, self.total, self.done = name, total, done
        self._numbers: dict[str, str] = {}
        self._progress = progress
        self._says_end = first_line_s == 0
        self._line_at = time.monotonic() + first_line_s
        self._since: tuple[float, int] | None = None  # when the first step had ended: it compiles, and tells no speed
        if progress:
            self._task = progress.add_task(name, total=total, completed=done, numbers="first step", left="")

    def show(self, **numbers: str) -> None:
        """Advance by one. A number that is not given again keeps its value."""
        self.done += 1
        self._numbers |= numbers
        text = "  ".join(f"{name} {self._numbers[name]}" for name in WATCHED if name in self._numbers)
        now = time.monotonic()
        left = self._left(now)
        if self._progress:
            self._progress.update(self._task, completed=self.done, numbers=text, left=left)
        elif now >= self._line_at or (self.done == self.total and self._says_end):
            self._line_at = now + LINE_EVERY_S
            say("  ".join(part for part in (f"{self.name} {self.done}/{self.total}", left, text) if part))

    def _left(self, now: float) -> str:
        """Time left, from the speed since the first step."""
        if self.done >= self.total:
            return ""
        if self._since is None:
            self._since = now, self.done
            return ""
        begin, first = self._since
        return clock((now - begin) / (self.done - first) * (self.total - self.done)) + " left"


@contextmanager
def bar(name: str, total: int, done: int = 0, first_line_s: float = 0.0) -> Iterator[Bar]:
    """A Bar for the length of a stage. first_line_s: in a log, silence until then; what is over sooner says nothing."""
    if not sys.stdout.isatty():
        yield Bar(name, total, done, None, first_line_s)
        return
    whole = Column(no_wrap=True)
    columns = [
        TextColumn("{task.description}", table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[left]}", table_column=whole),
        TextColumn(
            "{task.fields[numbers]}", table_column=Column(no_wrap=False)
        ),  # goes on in a second line where the terminal is narrow
    ]
    if console.width >= WIDE:
        columns.insert(1, BarColumn(bar_width=24, table_column=whole))
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield Bar(name, total, done, progress, first_line_s)


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def headline(values: Mapping[str, float]) -> dict[str, str]:
    """The numbers of a step that are worth watching."""
    shown = {}
    if "rollout/tokens_per_s" in values:
        shown["reward"] = f"{values['reward']:.3f}"
        if "em" in values:
            shown["EM"] = f"{values['em']:.3f}"
        shown |= {"tokens/s": f"{values['rollout/tokens_per_s']:,.0f}", "searches": f"{values['searches']:.2f}"}
    elif "loss/nll" in values:
        shown["nll"] = f"{values['loss/nll']:.3f}"
    if "validation/em" in values:
        shown["held-out EM"] = f"{values['validation/em']:.3f}"
    return shown
