"""A retrieval server of one's own: started, watched, and stopped with the process that needs it.

The listening socket belongs to this process and is inherited by the server. So the address is known before the server
lives, no port can be taken in between, and while a server that died is started again, connections wait.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

RESTARTS = 20  # in one training; a server that dies more often has a fault that starting does not mend
TOLD = 2000  # characters of its log in an error


class SpawnedServer:
    """python -m launch.serve_retrieval with these flags, on a free port of the loopback. What it says goes to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path):
        self.arguments, self.log = list(arguments), log
        self.restarts = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ending = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name="retrieval-server", daemon=True)
        self._watcher.start()

    def _start(self) -> subprocess.Popen:
        fd = self._listening.fileno()
        command = [sys.executable, "-m", "launch.serve_retrieval", f"--fd={fd}", "--end_with_stdin", *self.arguments]
        # Its encoder, if it has one, stays off the accelerator that is trained on.
        environment = {"JAX_PLATFORMS": "cpu"} | {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, pass_fds=[fd], env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the training
            )  # fmt: skip

    def _watch(self) -> None:
        while True:
            self._process.wait()
            self._close_pipe()
            if self._ending.is_set() or self.restarts >= RESTARTS:
                return
            self.restarts += 1
            self._ending.wait(min(5.0, 0.1 * 2**self.restarts))
            if self._ending.is_set():
                return
            self._process = self._start()

    def _close_pipe(self) -> None:
        """The server ends when this pipe does."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-TOLD:].strip() if self.log.exists() else ""

    def stop(self, within_s: float = 35.0) -> None:
        """Let it answer what is on its way, and end; killed where that takes too long."""
        self._ending.set()
        self._listening.close()
        until = time.monotonic() + within_s
        while self._watcher.is_alive():
            self._close_pipe()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.1, until - time.monotonic()))
            if self._process.poll() is None:
                self._process.kill()
            self._watcher.join(1.0)
