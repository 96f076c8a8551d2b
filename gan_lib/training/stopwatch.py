"""How fast a training goes, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator

from gan_lib.data.batches import Batch


class Stopwatch:
    """Started when it is made."""

    def __init__(self) -> None:
        self._n_images = 0
        self._started = time.perf_counter()
        # Since the last record.
        self._n_new, self._waited, self._since = 0, 0.0, self._started

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; their images, and the time that each takes to come, are counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._n_images += batch.n_total
            self._n_new += batch.n_total
            yield batch

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def rate(self) -> float:
        """Images per second since the start, over all ranks."""
        return self._n_images / self.seconds()

    def record(self) -> dict[str, float]:
        """For a record: the images per second since the last one, the share of that time that was
        waited for data (0 to 1), and the time of day."""
        now = time.perf_counter()
        seconds = now - self._since
        told = {
            "images_per_second": round(self._n_new / seconds, 2),
            "time": round(time.time(), 3),
            "data_wait": round(self._waited / seconds, 4),
        }
        self._n_new, self._waited, self._since = 0, 0.0, now
        return told
