"""Many runs at a glance: what each is, how far it came, and how good its pictures were."""

from __future__ import annotations

import contextlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gan_lib.base.errors import RunError
from gan_lib.base.storage import Folder
from gan_lib.results.files import PARAMETERS
from gan_lib.results.quality import best_line
from gan_lib.results.reading import SECONDS_WITHOUT_A_SIGN
from gan_lib.results.run import Run

# What is asked of an object store at the same time.
AT_ONCE = 16


@dataclass(frozen=True)
class Summary:
    """A run in one line.

    Attributes:
        name: of its folder.
        state: as in `RunStatus`; "silent" if it should train and gives no sign of life, "damaged"
            if it cannot be read.
        why: what is wrong, for "failed" and "damaged"; or why it ended by itself.
        epoch: the last one that has records.
        epochs: that it was told to train.
        images_per_second: over the records of that epoch.
        best: epoch with the least KID of those that have a checkpoint.
        kid: of that epoch.
        seen: its last sign of life, in seconds since 1970; 0 if there was none.
    """

    name: str
    state: str
    why: str = ""
    epoch: int = 0
    epochs: int = 0
    images_per_second: float | None = None
    best: int | None = None
    kid: float | None = None
    seen: float = 0.0

    @property
    def quality(self) -> str:
        """The least KID in words; empty if nothing was measured."""
        return "" if self.kid is None else f"KID {self.kid:.4f} (epoch {self.best})"


def summarise(run: Run) -> Summary:
    """What one line says of a run.

    Raises:
        RunError: if it is damaged.
    """
    status, lines = run.status(), run.quality()
    state = status.state
    if state in ("waiting", "training") and time.time() - status.time > SECONDS_WITHOUT_A_SIGN:
        state = "silent"
    records = []
    epochs = run.epochs("records")
    # A run that goes back to its last checkpoint deletes the records after it.
    with contextlib.suppress(RunError):
        records = run.plain_records(epochs[-1:])
    best = best_line(lines, run.epochs("checkpoints"))
    return Summary(
        name=run.url.rstrip("/").rpartition("/")[2],
        state=state,
        why=status.error or status.reason,
        epoch=epochs[-1] if epochs else 0,
        epochs=run.parameters.epochs,
        images_per_second=statistics.median(r["images_per_second"] for r in records)
        if records
        else None,
        best=best["epoch"] if best else None,
        kid=best["kid"] if best else None,
        seen=status.time,
    )


def summaries(url: str) -> list[Summary]:
    """The runs right below a folder, here or in an object store; the newest first.

    Raises:
        RunError: if there is none.
        ParameterError: as `Folder`.
    """
    folder = Folder(url)

    def look(name: str) -> Summary | None:
        if not folder.exists(f"{name}/{PARAMETERS}"):
            return None
        try:
            return summarise(Run(f"{url.rstrip('/')}/{name}"))
        except RunError as error:
            return Summary(name, "damaged", why=str(error))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [summary for summary in pool.map(look, folder.names("")) if summary]
    if not found:
        raise RunError(f"there is no run in {url}: `python -m gan_lib train` makes one")
    return sorted(found, key=lambda summary: summary.seen, reverse=True)
