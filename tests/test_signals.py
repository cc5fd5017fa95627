import os
import signal
import threading

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
