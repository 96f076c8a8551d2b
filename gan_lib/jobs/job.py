"""A training that can be left alone: what is held of it here, and how it ends with this process."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from distributed import Client

from gan_lib.cluster.starting import BEFORE_CLOSING
from gan_lib.cluster.workers import Place, Watch
from gan_lib.jobs.supervisor import Plan, Supervisor
from gan_lib.results.watching import watch_run

# How long a job may take to keep a checkpoint when its process or its cluster ends.
SECONDS_TO_PART = 10.0
# Those of this process: also of jobs that nobody holds any more.
_SUPERVISORS: weakref.WeakSet[Supervisor] = weakref.WeakSet()


class Job:
    """A training that runs on a cluster, watched over, and started again where it is interrupted.

    Attributes:
        run: its run directory, to be read at any time.
        workers: addresses of the workers, by rank.
        restarts: why it was started again, a sentence for each time.
    """

    def __init__(
        self, watch: Watch, url: str, plan: Plan, places: list[Place], resume: bool
    ) -> None:
        self._supervisor = Supervisor(watch, url, plan, resume)
        self.run = self._supervisor.run
        self.workers = self._supervisor.workers
        self.restarts = self._supervisor.restarts
        _SUPERVISORS.add(self._supervisor)
        threading.Thread(
            target=self._supervisor.supervise, args=(places,), name="supervising", daemon=True
        ).start()

    def wait_for_ranks(self) -> None:
        """Wait until another job that is launched next would see that these workers are taken."""
        self._supervisor.begun.wait()

    def abandon(self) -> None:
        """Have it keep a checkpoint and end, because nobody will get to hold it."""
        _end([self._supervisor], SECONDS_TO_PART)

    def __repr__(self) -> str:
        return f"<Job {self.status} on {len(self.workers)} workers, {self.run.url}>"

    @property
    def status(self) -> str:
        """What the job does: "waiting", "training", "stopped", "finished" or "failed"."""
        if self.error() is not None:
            return "failed"
        said = self.run.status().state
        return said if self.done() or said == "training" else "waiting"

    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self._supervisor.ended.is_set()

    def error(self) -> BaseException | None:
        """What ended the job; None while it goes on, or if it ended well."""
        return self._supervisor.error

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for the end; what each rank of the last attempt returned, by rank.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            The error of the rank that failed first, with that rank's traceback.
            WorkerLostError: if a worker was lost once too often.
            TimeoutError: if it takes longer than `timeout`.
        """
        if not self._supervisor.ended.wait(timeout):
            raise TimeoutError(f"the job still runs after {timeout} s")
        if self._supervisor.error is not None:
            raise self._supervisor.error
        return self._supervisor.results

    def watch(self) -> None:
        """Show the progress until the job ends, and raise its error if it fails.

        An interrupt stops the watching, not the job.
        """
        try:
            watch_run(self.run, goes_on=lambda: not self.done())
        except KeyboardInterrupt:
            print("stopped watching; the job goes on: watch() looks again, stop() ends it")
            return
        self.result()

    def leave(self) -> None:
        """Watch over it no more, from this moment: a job that has not ended is "interrupted"."""
        self._supervisor.part()
        _SUPERVISORS.discard(self._supervisor)

    def stop(self, now: bool = False) -> None:
        """Ask the job to end with a checkpoint: after the current epoch, or at once if `now`."""
        self._supervisor.stop(now)


def end_jobs(
    client: Client | None = None, folder: str = "", seconds: float = SECONDS_TO_PART
) -> None:
    """Have jobs of this process keep a checkpoint and end, because it or their cluster does.

    What does not end in time is "interrupted".

    Args:
        client: only the jobs of this one; None means all.
        folder: only those whose run's URL begins with it.
        seconds: how long they may take.
    """
    chosen = [each for each in _SUPERVISORS if client in (None, each.client)]
    _end([each for each in chosen if each.run.url.startswith(folder)], seconds)


def _end(supervisors: Sequence[Supervisor], seconds: float) -> None:
    running = [each for each in supervisors if not each.ended.is_set()]
    deadline = time.monotonic() + seconds
    try:
        for each in running:
            print(f"the job in {each.run.url} is asked to stop, because what runs it ends")
            with contextlib.suppress(Exception):
                each.stop(now=True)
        for each in running:
            each.ended.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for each in running:
            each.part()


# While there still are threads, which storage and Dask need: `atexit` comes after them.
getattr(threading, "_register_atexit", atexit.register)(end_jobs)
BEFORE_CLOSING.append(end_jobs)
