"""Looking at a run while it goes on, from its files alone.

Whoever can read a run directory can watch it: the notebook that launched it,
another one, or a terminal on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gan_lib import plots
from gan_lib.progress import ProgressBar, is_headless, progress_text
from gan_lib.results import Run

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_PICTURES = 4.0


def watch_run(run: Run, goes_on: Callable[[], bool]) -> None:
    """Show the progress of a run until `goes_on` says no.

    A bar with the newest losses; in a notebook also the newest samples and the
    loss curves. Headless, the bar is a line every few seconds.

    Args:
        run: to be watched.
        goes_on: asked at every look.
    """
    picture = _LivePicture(run)
    while "steps_per_epoch" not in run.info():
        if not goes_on():
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
    steps_per_epoch = run.info()["steps_per_epoch"]
    total = steps_per_epoch * run.parameters.epochs
    with ProgressBar(total, "training", "step") as bar:
        while True:
            # Asked before the look, so that the last look comes after the end.
            going = goes_on()
            last = _newest_record(run)
            if last is not None:
                # Between two records nobody knows more than the last one says; a run that ended
                # well has also done the steps after it.
                now = last["iteration"]
                if not going and run.status().state in ("finished", "stopped"):
                    now = last["epoch"] * steps_per_epoch
                bar.update(now - bar.done, progress_text(last, run.parameters.epochs))
                picture.update()
            if not going:
                picture.update(final=True)
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _newest_record(run: Run) -> dict[str, Any] | None:
    for epoch in reversed(run.epochs("records")):
        records = run.records([epoch]).to_dict("records")
        if records:
            return records[-1]
    return None


class _LivePicture:
    """Newest samples next to the losses, redrawn in place; only where somebody looks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._handle: Any = None
        self._drawn_at = 0.0
        self._active = not is_headless() and _in_notebook()

    def update(self, final: bool = False) -> None:
        now = time.monotonic()
        if not self._active or (now - self._drawn_at < SECONDS_BETWEEN_PICTURES and not final):
            return
        self._drawn_at = now
        from IPython.display import display

        figure = plots.plot_progress(self._run)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
