"""Ctrl-C and SIGTERM while something goes on: real processes, real signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gan_lib.interrupts import interruptible


def test_sigterm_is_raised_as_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_the_first_signal_asks_and_the_second_raises(
    number: int, raised: type[BaseException]
) -> None:
    leave = threading.Event()
    done = []
    with pytest.raises(raised), interruptible(), interruptible(leave):
        os.kill(os.getpid(), number)
        assert leave.is_set()
        done.append("to its end")
    assert not leave.is_set()
    with pytest.raises(raised), interruptible(leave):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        done.append("never")
    assert not leave.is_set()
    assert done == ["to its end"]


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=interruptible()(lambda: got.append(0)))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM, 0]
