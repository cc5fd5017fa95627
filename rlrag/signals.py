"""Being asked to end: a scheduler sends SIGTERM some time before it kills."""

import signal
import threading
from types import FrameType


class Stopping:
    """A context in which SIGTERM does not kill but sets `asked`; the work looks at it between steps. Only the main
    thread may install a handler: elsewhere nothing is installed and `asked` stays False."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
