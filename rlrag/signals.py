"""Being asked to end: a scheduler sends SIGTERM some time before it kills; a person types Ctrl-C."""

import signal
import threading
from types import FrameType


class Stopping:
    """A context in which SIGTERM does not kill but sets `asked`; the work looks at it between steps. Only the main
    thread may install a handler: elsewhere nothing is installed and `asked` stays False.

    Ctrl-C raises KeyboardInterrupt at once, as ever; but where Python runs a destructor or a callback of C code at that
    moment, the exception is printed and lost. `look` raises it again.
    """

    def __init__(self) -> None:
        self.asked = self._interrupted = False

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask), signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before[0])
            signal.signal(signal.SIGINT, self._before[1])

    def look(self) -> None:
        """Raise a KeyboardInterrupt that was lost."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt
