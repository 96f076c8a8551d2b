"""How fast a training goes, and where its time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from gan_lib.data.batches import Batch

# What a training does beside its steps, in words.
BESIDE = {
    "data": "waiting for data",
    "keeping": "keeping records, pictures and checkpoints",
    "measuring": "measuring the pictures",
}
PARTS = ("step", *BESIDE)
# A run that is shorter has spent its time on beginning, and one that spends less is well.
SECONDS_WORTH_A_NOTE, SHARE_WORTH_A_NOTE = 60.0, 0.1


class Stopwatch:
    """Started when it is made."""

    def __init__(self) -> None:
        self._n_images = 0
        self._started = time.perf_counter()
        self._all = dict.fromkeys(PARTS, 0.0)  # seconds
        # Since the last record.
        self._n_new, self._new, self._since = 0, dict.fromkeys(PARTS, 0.0), self._started

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is done in here is one of PARTS."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._all[part] += seconds
            self._new[part] += seconds

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; their images, and the time that each takes to come, are counted."""
        while True:
            with self.during("data"):
                batch = next(batches, None)
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
        """For a record, since the last one: images per second, the share of the time that was
        waited for data (0 to 1), seconds of each part; and the time of day."""
        now = time.perf_counter()
        seconds = now - self._since
        told = {
            "images_per_second": round(self._n_new / seconds, 2),
            "time": round(time.time(), 3),
            "data_wait": round(self._new["data"] / seconds, 4),
            **{f"seconds_{part}": round(spent, 4) for part, spent in self._new.items()},
        }
        self._n_new, self._new, self._since = 0, dict.fromkeys(PARTS, 0.0), now
        return told

    def note(self) -> str:
        """What a run spends its time on that spends too much beside its steps; else empty."""
        seconds = self.seconds()
        beside = 1 - self._all["step"] / seconds
        if seconds < SECONDS_WORTH_A_NOTE or beside <= SHARE_WORTH_A_NOTE:
            return ""
        most = sorted(BESIDE, key=lambda part: -self._all[part])
        shares = [f"{self._all[part] / seconds:.0%} on {BESIDE[part]}" for part in most]
        return f"{beside:.0%} of the time went beside the steps: {', '.join(shares)}"
