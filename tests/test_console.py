import io

import pytest
from rich.console import Console

from rlrag import console
from rlrag.console import LINE_EVERY_S, bar, clock, headline, say


class Clock:
    """A monotonic clock that moves when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    monkeypatch.setattr(console, "time", Clock())
    return console.time


def test_say_prints_text_as_it_is(capsys):
    say("search_grpo:b: [0.1, 0.2] " + "long " * 40)
    assert capsys.readouterr().out == "search_grpo:b: [0.1, 0.2] " + "long " * 40 + "\n"


def test_a_log_gets_a_line_now_and_then(time, capsys):
    with bar("main", 50, done=10) as progress:
        for _ in range(40):
            time.now += 1.0
            progress.show(reward="0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "main 11/50  reward 0.5",  # the first step compiles: it says nothing of the time left
        "main 21/50  0:29 left  reward 0.5",
        "main 31/50  0:19 left  reward 0.5",
        "main 41/50  0:09 left  reward 0.5",
        "main 50/50  reward 0.5",
    ]
    assert LINE_EVERY_S == 10


def test_a_number_stays_until_it_is_given_again(time, capsys):
    with bar("main", 3) as progress:
        for numbers in ({"EM": "0.1"}, {"EM": "0.2", "held-out EM": "0.9"}, {"EM": "0.3"}):
            time.now += LINE_EVERY_S
            progress.show(**numbers)
    assert capsys.readouterr().out.splitlines()[-1] == "main 3/3  EM 0.3  held-out EM 0.9"


def test_what_is_over_soon_says_nothing(time, capsys):
    with bar("test", 3, first_line_s=10) as progress:
        for _ in range(3):
            time.now += 3
            progress.show(EM="0.5")
    assert capsys.readouterr().out == ""
    with bar("test", 3, first_line_s=10) as progress:
        for _ in range(3):
            time.now += 6
            progress.show(EM="0.5")
    assert capsys.readouterr().out == "test 2/3  0:06 left  EM 0.5\n"


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_gets_a_live_bar_with_every_number(monkeypatch, width):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width, color_system=None, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    numbers = {"reward": "0.512", "EM": "0.512", "held-out EM": "0.375", "tokens/s": "14,827", "searches": "1.25"}
    with bar("main", 200, done=3) as progress:
        progress.show(**numbers)
        progress.show(**numbers)
    shown = screen.getvalue()
    assert "first step" in shown
    assert "5/200" in shown
    assert "left" in shown
    for name, value in numbers.items():
        assert f"{name} {value}" in shown or (name in shown and value in shown)
    assert "…" not in shown
    assert ("╸" in shown) == (width == 140), "the bar itself"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (59.7, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_headline():
    values = {"reward": 0.25, "em": 0.125, "searches": 1.5, "rollout/tokens_per_s": 12345.6, "loss/surrogate": 1.0}
    shown = {"reward": "0.250", "EM": "0.125", "tokens/s": "12,346", "searches": "1.50"}
    assert headline(values) == shown
    assert headline(values | {"validation/em": 0.5}) == shown | {"held-out EM": "0.500"}
    assert headline({"loss/nll": 1.23456, "reward": 0.9, "searches": 2}) == {"nll": "1.235"}
    assert set(shown) | {"held-out EM", "nll"} <= set(console.WATCHED)
