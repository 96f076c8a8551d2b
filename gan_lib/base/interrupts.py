"""Ctrl-C and SIGTERM: what goes on comes to its end before the process does.

Python raises KeyboardInterrupt for the first, and does nothing of the sort for the second,
which is what `kill`, systemd, Slurm and Kubernetes send.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class _Handler:
    """Raises for each signal; for the first one, if there is an event, sets that instead."""

    def __init__(self, leave: threading.Event | None = None) -> None:
        self.leave = leave
        self.first: int | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        if self.leave is None or self.first is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)  # as a shell counts what a signal has ended
        self.first = number
        self.leave.set()
        # Not print: the signal may have come inside of another one.
        os.write(2, b"\nending what runs, which keeps what it has done; once more ends at once\n")


@contextlib.contextmanager
def interruptible(leave: threading.Event | None = None) -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit(143), as SIGINT raises KeyboardInterrupt.

    Does nothing in any thread but the main one, where signals arrive, and with a signal for
    which somebody else has set a handler. It can be used as a decorator, too.

    Args:
        leave: set by the first signal, which then raises nothing before the end of the block,
            where the event is cleared; a second signal raises at once.
    """
    handler = _Handler(leave)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if _is_free(n)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if leave is not None and handler.first is not None:
            leave.clear()
    if handler.first is not None:
        _Handler()(handler.first)


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends this process as `sys.exit(143)` does, not without a word."""
    if _is_free(signal.SIGTERM):
        signal.signal(signal.SIGTERM, _Handler())


def _is_free(number: int) -> bool:
    """Whether this thread may set a handler, and nobody else has set one."""
    if threading.current_thread() is not threading.main_thread():
        return False
    now = signal.getsignal(number)
    return now in (signal.SIG_DFL, signal.default_int_handler) or isinstance(now, _Handler)
