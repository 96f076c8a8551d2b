"""How long it will take: one progress bar for a person, a few lines for a log.

In a notebook or a terminal a bar is drawn by tqdm. Headless (papermill, CI) the
same progress is a line every few seconds, in a fixed form that the notebook
runner reads back to draw a bar of its own.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from tqdm.auto import tqdm

# Set by the notebook runner for the kernels that it starts.
HEADLESS_VARIABLE = "GAN_LIB_HEADLESS"
SECONDS_BETWEEN_LINES = 5.0
# Begins a line that is no progress, and that whoever sees only progress should read too.
NOTE = "note: "
# A rate is believed when it was measured for so long, and worth a line if so much is still to come.
SECONDS_TO_MEASURE, SECONDS_WORTH_A_LINE = 5.0, 60.0
DAY = 86_400.0


def is_headless() -> bool:
    """Whether output goes to a log: nobody watches, or a program does."""
    return os.environ.get(HEADLESS_VARIABLE) == "1"


class ProgressBar:
    """Progress towards a known total; a context manager.

    Args:
        total: units of work altogether.
        description: what is being done, one word.
        unit: what is counted, in the singular.
        show: False keeps quiet (on the ranks of a cluster, where nobody looks).
        forecast: say once, after the first units, how long the others will take.
        initial: units that were done before, which tell nothing of how long the others take.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        show: bool = True,
        forecast: bool = False,
        initial: int = 0,
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.done = self._initial = initial
        self.text = ""
        self._lines = show and is_headless()
        self._printed_at = time.monotonic()
        self._forecast = forecast
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        if show and not self._lines:
            self._bar = tqdm(
                total=total, desc=description, unit=unit, file=sys.stdout, initial=initial
            )

    def update(self, n: int, text: str = "", at: float | None = None) -> None:
        """Count `n` more units done, the last of them `at` this time in seconds (None: now);
        `text` says what else is worth knowing."""
        self.done += n
        self.text = text or self.text
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
        elif self._lines and time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print()
        if self._forecast and self.done > self._initial:
            self._tell_time_left(time.time() if at is None else at)

    def _tell_time_left(self, at: float) -> None:
        # The very first units also warm up: they are left out of the measurement.
        if self._first is None:
            self._first = (self.done, at)
        done, seconds = self.done - self._first[0], at - self._first[1]
        if done > 0 and seconds >= SECONDS_TO_MEASURE:
            self._forecast = False
            self.note(time_left(self.total - self.done, seconds / done))

    def note(self, sentence: str) -> None:
        """Print a line above the bar; nothing for an empty sentence."""
        if sentence and self._bar is not None:
            self._bar.write(f"{NOTE}{sentence}")
        elif sentence and self._lines:
            print(f"{NOTE}{sentence}", flush=True)

    def _print(self) -> None:
        self._printed_at = time.monotonic()
        print(
            f"{self.description} {self.done}/{self.total} {self.unit} {self.text}".rstrip(),
            flush=True,
        )

    def close(self) -> None:
        """Draw the last state."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            self._print()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress_text(record: Mapping[str, Any], epochs: int) -> str:
    """The newest record of a run of so many epochs, in one short line."""
    return (
        f"epoch {record['epoch']}/{epochs} loss_d {record['loss_d']:.3f} "
        f"loss_g {record['loss_g']:.3f} {record['images_per_second']:.0f} images/s"
    )


def time_left(steps: int, seconds_each: float) -> str:
    """A sentence about the steps to come, with a cure for more than a day; empty if it is short."""
    seconds = steps * seconds_each
    if seconds < SECONDS_WORTH_A_LINE:
        return ""
    minutes, hours = seconds / 60, seconds / 3600
    about = f"{minutes:.0f} minutes" if minutes < 100 else f"{hours:.0f} hours"
    sentence = f"the {steps:,} steps to come take about {about}, at {seconds_each:.2g} s each"
    if seconds > DAY:
        sentence += (
            ". For less than a day: fewer epochs, a smaller image_size, max_images, narrower "
            "networks (ngf, ndf), or GPUs; on CPUs precision auto or float32"
        )
    return sentence


class ProgressLine(NamedTuple):
    """What one headless line says."""

    description: str
    done: int
    total: int
    unit: str
    text: str


def parse_progress(line: str) -> ProgressLine | None:
    """Read a line that a headless ProgressBar printed; None for any other line."""
    match = re.fullmatch(r"(\w+) (\d+)/(\d+) (\w+) ?(.*)", line.strip())
    if match is None:
        return None
    description, done, total, unit, text = match.groups()
    return ProgressLine(description, int(done), int(total), unit, text)
