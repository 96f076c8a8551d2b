"""Attempts at a training, one after the other, until one ends well or no other is worth it.

The client watches; the workers train. What a failed attempt leaves behind is a checkpoint, and
the next attempt goes on from it on the workers that there are then.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from distributed.scheduler import KilledWorker

from gan_lib.base.errors import (
    ClusterError,
    RunError,
    UserError,
    WorkerLostError,
    WorkerRetiredError,
    describe,
)
from gan_lib.cluster.workers import Place, Watch, assign_places, replace_lost_workers
from gan_lib.data.image_set import open_prepared
from gan_lib.jobs.rank_group import RankGroup, start_ranks
from gan_lib.jobs.rank_task import SECONDS_TO_RETIRE
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import PARAMETERS, REGROUP, STOP
from gan_lib.results.run import open_run
from gan_lib.results.writing import OwnWriter
from gan_lib.training.rank import RETIRED, train_gan
from gan_lib.training.result import TrainingResult

SECONDS_BETWEEN_LOOKS = 0.3
# A worker that has just come may go again.
SECONDS_TO_SETTLE = 3.0
# How long too few workers are waited for.
SECONDS_FOR_WORKERS = 600.0
# How often, and for how long, a scheduler is asked that does not answer.
SECONDS_BETWEEN_QUESTIONS, QUESTIONS = 2.0, 5
# Seconds at most before storage is tried again that has failed.
LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Plan:
    """What a job does, and how it goes on when something fails: the arguments of `launch`.

    Attributes:
        prepared: folder of the images, where all ranks read it; empty has each prepare its own.
    """

    parameters: TrainingParameters
    function: Callable[..., Any]
    n_workers: int | None
    min_workers: int
    max_restarts: int
    grace: float
    new_images: bool
    prepared: str


class Supervisor:
    """Has the workers of a cluster train, in as many attempts as it takes.

    The run directory at `url` becomes its own, and so do the workers that `watch` has claimed,
    until it has ended. What it tells is shown by a `Job`.

    Attributes:
        name: of the job; what status.json names as the attempt begins with it.
        begun: set when the ranks have been started, for the first time.
        ended: set when nothing is done any more.
    """

    def __init__(self, watch: Watch, url: str, plan: Plan, resume: bool) -> None:
        self.client = watch.client
        self.name = uuid.uuid4().hex
        self.workers: list[str] = []
        self.restarts: list[str] = []
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.begun, self.ended = threading.Event(), threading.Event()
        self._plan = plan
        self._resume = resume
        self._attempt = self.name
        self._watch = watch
        self._used: set[str] = set()
        # When no worker was free, or wanted, for the last time.
        self._busy_at = time.monotonic()
        self._most: int | None = None
        self._failures = self._storage_failures = 0
        # What this process writes last of a job is that it parts from it.
        self._saying = threading.RLock()
        self._parted = False
        self._writer = OwnWriter.claim(url, self.name)
        if resume:
            # Only now: until it was claimed, the run may have been another job's.
            told = open_run(url).info() | {"parameters": plan.parameters.to_dict()}
            self._writer.submit_result(PARAMETERS, json.dumps(told, indent=2))
        self.run = open_run(url)

    def stop(self, now: bool) -> None:
        """Ask for the end, as `Run.stop`, unless another job goes on with the run by now."""
        if not self.ended.is_set() and self._writer.owns():
            self.run.stop(now)

    def part(self) -> None:
        """Say that nobody watches over this job any more, if it has not ended."""
        with self._saying, contextlib.suppress(Exception):
            if not self.ended.is_set() and self.run.status().state in ("waiting", "training"):
                self._say("interrupted")
        self._parted = True

    def supervise(self, places: list[Place]) -> None:
        """Train until that has ended, well or not, on these workers at first."""
        try:
            while places:
                wanted = self._plan.n_workers or len(places)
                error = self._try_on(places)
                if error is not None:
                    self._note(error)
                elif self._left_to("regroup"):
                    wanted = len(places) + 1
                elif not self._left_to("retire"):
                    return
                places = self._workers_to_go_on_with(wanted)
                self._resume = True
        except BaseException as error:
            self.error = error
            # That there is no cluster for it is no fault of the run.
            lost = isinstance(error, ClusterError) and not isinstance(error, WorkerLostError)
            with contextlib.suppress(Exception):
                if self.run.status().state != "interrupted":
                    self._say("interrupted" if lost else "failed", error=describe(error))
        finally:
            self._watch.release()
            self.ended.set()

    def _try_on(self, places: list[Place]) -> BaseException | None:
        """Train on these workers; what ended it, or None if it ended well."""
        plan = self._plan
        self.workers[:] = [place.worker for place in places]
        self._used |= set(self.workers)
        arguments = {"parameters": plan.parameters, "run": self.run.url, "resume": self._resume}
        function = plan.function
        if function is train_gan:
            function = _train
            arguments |= {"prepared": plan.prepared, "new_images": plan.new_images}
        try:
            self._claim()
            device = plan.parameters.device
            futures = start_ranks(self.client, places, device, function, arguments, self._attempt)
        except (OSError, KeyError, WorkerLostError) as lost:
            # A worker that has gone in the meantime; the run directory cannot be written.
            return lost if isinstance(lost, OSError) else WorkerLostError(str(lost))
        finally:
            self.begun.set()
        self._busy_at = time.monotonic()
        group = RankGroup(self.client, futures, self._watch)
        error = self._until_it_ends(group)
        if error is None:
            self.results = group.result()
        return error

    def _until_it_ends(self, group: RankGroup) -> BaseException | None:
        unanswered = 0
        while True:
            try:
                if group.done():
                    return group.error()
                self._let_new_workers_in()
                unanswered = 0
                time.sleep(SECONDS_BETWEEN_LOOKS)
            except Exception as error:
                unanswered += 1
                if self.client.status not in ("running", "connecting") or unanswered == QUESTIONS:
                    raise ClusterError(
                        "the client of this job has lost its cluster; its ranks keep a checkpoint "
                        "if they can, and open_run(...).resume(client) goes on from it"
                    ) from error
                time.sleep(SECONDS_BETWEEN_QUESTIONS)

    def _note(self, error: BaseException) -> None:
        """Write down why there is another attempt, or raise `error` if there is none."""
        if not worth_a_retry(error):
            raise error
        if not self._left_in_peace(error):
            if self._failures == self._plan.max_restarts:
                error.add_note(f"after {self._failures} failures, and max_restarts allows no more")
                raise error
            self._failures += 1
        # A disk that is full stays so for a while; a lost worker is no reason to wait.
        self._storage_failures = self._storage_failures + 1 if isinstance(error, OSError) else 0
        if self._storage_failures > 1:
            time.sleep(min(2.0**self._storage_failures, LONGEST_PAUSE))
        said = describe(error).splitlines()[0]
        self.restarts.append(f"{time.strftime('%H:%M:%S')} {said}")
        with contextlib.suppress(OSError):
            self._claim()

    def _left_in_peace(self, error: BaseException) -> bool:
        """Whether the ranks have kept a checkpoint and left a worker that is to end.

        The worker is still there when Dask's scheduler knows it no more, and may write yet.
        """
        deadline = time.monotonic() + SECONDS_TO_RETIRE
        while isinstance(error, WorkerRetiredError) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, RunError):
                told = self.run.status()
                if told.job == self._attempt and told.reason == RETIRED:
                    return True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    def _workers_to_go_on_with(self, wanted: int) -> list[Place]:
        """Wait for workers; none if somebody asks to stop meanwhile.

        Raises:
            ClusterError: if there are too few for too long.
        """
        plan = self._plan
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            free: list[str] = []
            least = plan.min_workers if waited > plan.grace else max(wanted, plan.min_workers)
            # A scheduler that is too busy to answer may answer the next time.
            with contextlib.suppress(OSError, WorkerLostError):
                free = [worker for worker, busy in self._watch.alive().items() if not busy]
                self._watch.end_hanging(self._used)
                if len(free) >= least:
                    places = assign_places(free, self._most_ranks())
                    if self._watch.claim([place.worker for place in places]):
                        return places
            if self._writer.request():
                self._say("stopped")
                self._writer.remove(STOP)
                return []
            if waited > SECONDS_FOR_WORKERS:
                raise ClusterError(
                    f"{len(free)} workers are left and min_workers is {plan.min_workers}: start "
                    "more, then open_run(...).resume(client) goes on from the last checkpoint"
                )
            replace_lost_workers(self.client)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _let_new_workers_in(self) -> None:
        """Have the ranks end after this epoch if there are more workers than they use."""
        now = time.monotonic()
        if self._plan.function is not train_gan or len(self.workers) >= self._most_ranks():
            self._busy_at = now
            return
        replace_lost_workers(self.client)
        if all(self._watch.alive().values()):
            self._busy_at = now
        settled = now - self._busy_at > SECONDS_TO_SETTLE
        if settled and not self._writer.exists(REGROUP) and self._writer.owns():
            self._writer.submit_result(REGROUP, "")

    def _left_to(self, what: str) -> bool:
        """Whether the ranks ended to "regroup" with more of them, or to let a worker "retire"."""
        first = self.results[0]
        return isinstance(first, TrainingResult) and first.asked == what and first.stopped

    def _most_ranks(self) -> int:
        """As many as are allowed, and have an image each in every step."""
        if self._most is None:
            info = self.run.info()
            if "steps_per_epoch" not in info:
                return len(self.workers)
            most = info["images"] // info["steps_per_epoch"]
            self._most = min(most, self._plan.n_workers or most)
        return self._most

    def _claim(self) -> None:
        """Name a new attempt in status.json: what is left of an earlier one writes nothing more.

        Raises:
            RunError: as `_say`.
        """
        self._attempt = f"{self.name}-{len(self.restarts)}-{uuid.uuid4().hex[:8]}"
        self._say("waiting")

    def _say(self, state: str, **details: Any) -> None:
        """Write what the job does.

        Raises:
            RunError: if another one goes on with the run by now, or nobody watches over this one.
        """
        with self._saying:
            if self._parted:
                raise RunError(f"nobody watches over {self.run.url} any more: this one ends here")
            self._writer.set_status(state, job=self._attempt, restarts=self.restarts, **details)


def _train(prepared: str, **told: Any) -> TrainingResult:
    """On a rank: train on the images that were prepared when the job began.

    Their source may have other files by now.
    """
    return train_gan(images=open_prepared(prepared) if prepared else None, **told)


def worth_a_retry(error: BaseException) -> bool:
    """Whether the same might go well on other workers, or a moment later.

    Lost workers and connections, and storage that cannot be reached, are worth it; what the
    user said, and an error in the code, would fail again.
    """
    if isinstance(error, UserError):
        return isinstance(error, WorkerLostError)
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    if isinstance(error, OSError | CancelledError | KilledWorker | dist.DistError):
        return True
    # gloo raises plain RuntimeErrors, told apart by nothing but their text.
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in said for sign in ("gloo", "NCCL", "Connection closed by peer", "TCPStore")
    )
