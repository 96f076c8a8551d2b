"""Looking at a run while it goes on, from its files alone.

Whoever can read a run directory can watch it: the notebook that launched it,
another one, or a terminal on another machine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from gan_lib.base.errors import RunError
from gan_lib.base.progress import ProgressBar, is_headless, progress_text
from gan_lib.results import plots
from gan_lib.results.reading import SECONDS_WITHOUT_A_SIGN
from gan_lib.results.run import Run

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
    picture = LivePicture(run)
    while "steps_per_epoch" not in run.info():
        if not goes_on():
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
    info = run.info()
    steps_per_epoch, epochs = info["steps_per_epoch"], info["parameters"]["epochs"]
    total = steps_per_epoch * epochs
    told = 0
    # A run that is resumed may have stood still for days.
    before = _newest_record(run)
    initial = before["iteration"] if before else 0
    with ProgressBar(total, "training", "step", forecast=True, initial=initial) as bar:
        bar.note(info.get("warning", ""))
        while True:
            # Asked before the look, so that the last look comes after the end.
            going = goes_on()
            last = _newest_record(run)
            for sentence in run.status().restarts[told:]:
                told += 1
                bar.note(f"{sentence}; going on from the last checkpoint")
            if last is not None:
                # Between two records nobody knows more than the last one says; a run that ended
                # well has also done the steps after it.
                now = last["iteration"]
                if not going and run.status().state == "finished":
                    now = last["epoch"] * steps_per_epoch
                bar.update(now - bar.done, progress_text(last, epochs), last["time"])
                picture.update()
            if not going:
                picture.update(final=True)
                bar.note(run.status().reason)
                bar.note(run.status().note)
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def watch_from_outside(run: Run) -> None:
    """Show the progress of a run that somebody else started, until it ends.

    An interrupt stops the watching. A run that gives no sign of life for a while has died with
    its machine: then that is said, and the watching ends.

    Args:
        run: to be watched.
    """
    heard = ""
    heard_at = time.monotonic()

    def goes_on() -> bool:
        nonlocal heard, heard_at
        status = run.status()
        if f"{status}" != heard:
            heard, heard_at = f"{status}", time.monotonic()
        silent = time.monotonic() - heard_at > SECONDS_WITHOUT_A_SIGN
        if silent:
            print(
                f"{run.url} has given no sign of life for {SECONDS_WITHOUT_A_SIGN:.0f} s: if what "
                "trained it is gone, resume(client) goes on from the last checkpoint"
            )
        return status.state in ("waiting", "training") and not silent

    try:
        watch_run(run, goes_on)
    except KeyboardInterrupt:
        print("stopped watching; the run goes on: watch() looks again, stop() ends it")
        return
    status = run.status()
    if status.state == "failed":
        print(f"the run has failed: {status.error}")
    elif status.state == "interrupted":
        print("the run was interrupted: resume(client) goes on from the last checkpoint")


def _newest_record(run: Run) -> dict[str, Any] | None:
    for epoch in reversed(run.epochs("records")):
        # A job that goes back to its last checkpoint deletes the records after it.
        with contextlib.suppress(RunError):
            records = run.plain_records([epoch])
            if records:
                return records[-1]
    return None


class LivePicture:
    """Newest samples next to the losses, redrawn in place; only where somebody looks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._handle: Any = None
        self._drawn_at = 0.0
        self._records: dict[int, pd.DataFrame] = {}
        self._active = not is_headless() and _in_notebook()

    def update(self, final: bool = False) -> None:
        """Draw it, if it was not just now; `final` draws it in any case."""
        now = time.monotonic()
        if not self._active or (now - self._drawn_at < SECONDS_BETWEEN_PICTURES and not final):
            return
        self._drawn_at = now
        from IPython.display import display

        try:
            figure = plots.plot_progress(self._run, self.records(anew=final))
        except RunError:
            return  # what was listed is gone: the next look finds what is there
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)

    def records(self, anew: bool = False) -> pd.DataFrame:
        """The run's; a finished epoch does not change, so its file is read once."""
        there = self._run.epochs("records")
        # A job that goes back to its last checkpoint deletes what came after it.
        self._records = {e: r for e, r in self._records.items() if e in there[:-1] and not anew}
        missing = [epoch for epoch in there if epoch not in self._records]
        new = self._run.records(missing)
        if len(new):
            self._records |= {epoch: new[new["epoch"] == epoch] for epoch in missing}
        known = [self._records[epoch] for epoch in sorted(self._records)]
        return pd.concat(known) if known else new


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
