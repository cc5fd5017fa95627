import os
import signal
import sys
import threading

import pytest

from rlrag.signals import Stopping


def test_a_request_to_end_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        assert not stopping.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_installs_nothing():
    found = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with Stopping() as stopping:
            found.append((stopping.asked, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_an_interrupt_that_was_lost_is_raised_again():
    """In a destructor an exception is printed and forgotten."""

    class Fragile:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the handler runs between two instructions of this
                pass

    before = signal.getsignal(signal.SIGINT)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with Stopping() as stopping:
            stopping.look()
            value = Fragile()
            del value
            with pytest.raises(KeyboardInterrupt):
                stopping.look()
    finally:
        sys.unraisablehook = hook
    assert signal.getsignal(signal.SIGINT) is before
