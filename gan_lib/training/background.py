"""The thread that writes a run's files: training waits for no disk and no store."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

# How often something else is done in between.
SECONDS_BETWEEN_LOOKS = 1.0
# Seconds before a file that could not be written is tried again: a disk may be full for a moment.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
# Files that may wait to be written: checkpoints among them hold memory.
WAITING_FILES = 8


class BackgroundWriter:
    """Carries out what writes files, in order, in a thread.

    What fails is tried again, with growing pauses. Once something has failed for good, nothing
    that comes after it is done, and whoever submits, checks or closes gets its error.

    Args:
        idle: called every second or so in between.
    """

    def __init__(self, idle: Callable[[], None]) -> None:
        self._idle = idle
        self._error: BaseException | None = None
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING_FILES)
        self._thread = threading.Thread(target=self._run, name="keeping", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Have it done after all that was submitted before; waits if that is too much."""
        self.check()
        self._waiting.put(lambda: function(*arguments, **named))

    def check(self) -> None:
        """Raise the error of what failed for good."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until everything is done."""
        self._waiting.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                work = self._waiting.get(timeout=SECONDS_BETWEEN_LOOKS)
                if work is None:
                    return
                self._do(work)
            if time.monotonic() - looked_at >= SECONDS_BETWEEN_LOOKS:
                looked_at = time.monotonic()
                self._do(self._idle)

    def _do(self, work: Callable[[], None]) -> None:
        for pause in (*PAUSES, None) if self._error is None else ():
            try:
                work()
                return
            except Exception as error:
                if pause is None or not isinstance(error, OSError):
                    self._error = error
                    return
                time.sleep(pause)
