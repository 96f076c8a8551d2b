"""Many runs of a fixed size, side by side on one cluster: as many at a time as it has workers for.

What is to be done is in the list of the sweep, and what has been done in the directories of its
runs: so the same call goes on where an earlier one has ended, however that was.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client

from gan_lib.base.checks import require_range
from gan_lib.base.errors import (
    ClusterError,
    ParameterError,
    RunError,
    TooFewWorkersError,
    UserError,
    WorkerLostError,
    describe,
)
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import Folder
from gan_lib.cluster.shipping import ship_package
from gan_lib.cluster.workers import (
    Watch,
    replace_lost_workers,
    wait_for_workers,
)
from gan_lib.data.checking import check_source
from gan_lib.jobs.job import Job, end_jobs
from gan_lib.jobs.launching import launch, require_shared_run
from gan_lib.jobs.supervisor import SECONDS_FOR_WORKERS, worth_a_retry
from gan_lib.parameters import TrainingParameters
from gan_lib.results.grids import list_runs
from gan_lib.results.sweep import LIST, TABLE, Sweep, write_list
from gan_lib.results.sweep_pictures import PAGE, PICTURE, write_results
from gan_lib.results.writing import RunWriter, create_run, refuse_taken
from gan_lib.sources.source import resolve_source

SECONDS_BETWEEN_LOOKS = 0.5
# How often a run is launched that the cluster fails, and not the run itself.
LAUNCHES = 5
LOCK = "sweep.lock"
# How long runs may take to keep a checkpoint after an interrupt; a second one ends them at once.
SECONDS_TO_STOP = 120.0


def sweep(
    client: Client,
    parameters: TrainingParameters | Mapping[str, Any] | None,
    grid: Mapping[str, Sequence[Any]],
    out: str,
    ranks: int = 1,
    paired: bool = False,
    sample: int = 0,
    retry_failed: bool = False,
    stop_worst: int = 0,
) -> Sweep:
    """Train a run for every combination of some values, each on `ranks` workers of its own.

    They run side by side on the workers that no other job uses; those that join or leave
    meanwhile are used as they are. A run that loses a worker goes on as any job of `launch`. One
    that fails ends nothing else. When all are done, a table and pictures lie in the folder,
    see `gan_lib.results.sweep`.

    The same call goes on with a sweep that was interrupted: runs that have finished are left
    alone, those that were begun are resumed. An interrupt has each keep a checkpoint.

    Args:
        client: of the cluster.
        parameters: of all runs; a mapping is checked like `TrainingParameters.from_mapping`.
        grid: parameter -> the values that it takes.
        out: folder for the runs, which workers and client share.
        ranks: workers of each run; it trains with neither fewer nor more.
        paired: combine the first values with each other, the second ones, and so on.
        sample: only so many of the combinations, drawn at random, the same every time.
        retry_failed: go on with those that have failed in an earlier call, too.
        stop_worst: after each measurement only one in so many goes on (2: the better half), see
            `_Sweeping._find_worst`; 0 stops none.

    Raises:
        ParameterError: if one of the runs could not be trained.
        SourceError: if there are no images.
        RunError: if another sweep lives in the folder.
        ClusterError: if there are too few workers, or the cluster is lost.
    """
    if not isinstance(parameters, TrainingParameters):
        parameters = TrainingParameters.from_mapping(parameters or {})
    parameters = parameters.replace(source=resolve_source(parameters.source))
    runs = list_runs(parameters, grid, paired, sample)
    check_sweep(parameters, runs, out, ranks, stop_worst)
    wait_for_workers(client, ranks)
    ship_package(client)
    waiting = "another call is at work on this sweep: waiting for its end"
    with Folder(out).locked(LOCK, LIST, TABLE, PICTURE, PAGE, waiting=waiting):
        listed = write_list(out, parameters, runs, ranks)
        require_shared_run(client, listed.url, LIST)
        try:
            _Sweeping(client, listed, retry_failed, stop_worst).until_the_end()
        except BaseException:
            # Also a run whose launch was just interrupted.
            end_jobs(client, f"{listed.url}/", SECONDS_TO_STOP)
            with contextlib.suppress(OSError):
                write_results(listed, pictures=False)
            print(f"the same call goes on with the sweep in {listed.url}")
            raise
        write_results(listed)
    return listed


def check_sweep(
    parameters: TrainingParameters,
    runs: Mapping[str, Mapping[str, Any]],
    out: str,
    ranks: int,
    stop_worst: int,
) -> None:
    """Find out what `sweep` refuses, as far as it needs no workers for that; raises as it does."""
    require_range("ranks", ranks, 1, None)
    for source in {values.get("source", parameters.source) for values in runs.values()}:
        check_source(source)
    if stop_worst:
        require_range("stop_worst", stop_worst, 2, None)
        if not all(run.get("quality_every", parameters.quality_every) for run in runs.values()):
            raise ParameterError(
                f"stop_worst is {stop_worst}, and quality_every 0: nothing is measured by which "
                "one run is worse than another. Set quality_every, such as 5"
            )
    if Folder(out).exists(LIST):
        write_list(out, parameters, runs, ranks)


class _Sweeping:
    """The runs that wait for workers, and the jobs of those that have some."""

    def __init__(self, client: Client, sweep: Sweep, retry_failed: bool, stop_worst: int) -> None:
        self._client, self._sweep, self._stop_worst = client, sweep, stop_worst
        self._watch = Watch(client)
        done = {"finished"} if retry_failed else {"finished", "failed"}
        self._waiting = deque(name for name in sweep.runs if sweep.state(name)[0] not in done)
        self._jobs: dict[str, Job] = {}
        self._launches: Counter[str] = Counter()
        self._failed = 0
        # By run: its KID by epoch, and why it was stopped as one of the worst.
        self._kids: dict[str, dict[int, float]] = {}
        self._worst: dict[str, str] = {}
        # When there were workers for the last time, or at least an answer.
        self._seen = time.monotonic()

    def until_the_end(self) -> None:
        """Train what is to be trained.

        Raises:
            ClusterError: if the cluster is lost.
        """
        total = sum(self._sweep.told(name).epochs for name in self._sweep.runs)
        with ProgressBar(total, "sweeping", "epoch") as bar:
            bar.update(self._epochs(), self._text())
            news = False
            while self._waiting or self._jobs:
                if self._stop_worst:
                    self._find_worst()
                for name in [name for name, job in self._jobs.items() if job.done()]:
                    bar.note(self._end(name, self._jobs.pop(name)))
                    news = True
                if self._may_start():
                    bar.note(self._start(self._waiting.popleft()))
                else:
                    # No worker waits for the table.
                    if news:
                        with contextlib.suppress(OSError):
                            write_results(self._sweep, pictures=False)
                    news = False
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                bar.update(self._epochs() - bar.done, self._text())

    def _may_start(self) -> bool:
        """Whether another run has its workers, and none that has lost one would miss them."""
        if not self._waiting:
            return False
        replace_lost_workers(self._client)
        alive: dict[str, bool] = {}
        with contextlib.suppress(OSError, WorkerLostError):
            alive = self._watch.alive()
        now = time.monotonic()
        if self._jobs or len(alive) >= self._sweep.ranks:
            self._seen = now
        if now - self._seen > SECONDS_FOR_WORKERS:
            raise ClusterError(
                f"the cluster has {len(alive)} workers, and a run of this sweep needs "
                f"{self._sweep.ranks}: start more, then the same call goes on"
            )
        lost = [w for job in self._jobs.values() for w in job.workers if w not in alive]
        free = [worker for worker, busy in alive.items() if not busy]
        return len(free) - len(lost) >= self._sweep.ranks

    def _start(self, name: str) -> str:
        """Launch or resume a run; a sentence if that failed."""
        sweep = self._sweep
        told, url, ranks = sweep.told(name), sweep.run_url(name), sweep.ranks
        try:
            self._jobs[name] = launch(
                self._client, told, url, n_workers=ranks, min_workers=ranks, resume=_begun(url)
            )
            self._launches[name] = 0
            return ""
        except Exception as error:
            # Somebody else was quicker, or a worker was lost meanwhile.
            again = isinstance(error, TooFewWorkersError)
            if not again and (isinstance(error, ClusterError) or worth_a_retry(error)):
                self._launches[name] += 1
                again = self._launches[name] < LAUNCHES
            if not again:
                return self._fail(name, error)
            self._waiting.appendleft(name)
            return ""

    def _fail(self, name: str, error: Exception) -> str:
        """Keep why a run cannot even be launched where one that fails later keeps it."""
        self._failed += 1
        said = describe(error)
        with contextlib.suppress(UserError, OSError):
            if self._sweep.run(name) is None:
                create_run(self._sweep.run_url(name), self._sweep.told(name))
            state, why = self._sweep.state(name)
            if state not in ("training", "finished") and why != said:
                RunWriter(self._sweep.run_url(name)).set_status("failed", error=said)
        return f"{name} cannot be trained: {said}"

    def _end(self, name: str, job: Job) -> str:
        """What to say of a job that has ended."""
        error = job.error()
        if isinstance(error, ClusterError) and not isinstance(error, WorkerLostError):
            # Its workers are gone, and others will come: the run waits for them as it is.
            self._waiting.appendleft(name)
            return f"{name} waits for workers: {error}"
        self._failed += error is not None
        state, why = self._sweep.state(name)
        if state == "stopped" and name in self._worst:
            # So that the next call takes it as it is, as one that patience has ended.
            state, why = "finished", self._worst[name]
            told = job.run.status()
            RunWriter(job.run.url).set_status(
                state, job=told.job, restarts=told.restarts, reason=why
            )
        return f"{name}: {state}" + (f": {why}" if why else "")

    def _find_worst(self) -> None:
        """Have runs end that, after some epoch, were not among the best of those measured then.

        That is successive halving (arXiv:1502.07943) without its rounds: who is measured early
        is compared again as others come, until it has ended itself.
        """
        for name in self._jobs if self._kids else self._sweep.runs:
            with contextlib.suppress(UserError, OSError):
                run = self._sweep.run(name)
                lines = [] if run is None else run.quality()
                self._kids[name] = {line["epoch"]: line["kid"] for line in lines}
        for name in self._jobs.keys() - self._worst.keys():
            for epoch, kid in self._kids.get(name, {}).items():
                kids = sorted(kids[epoch] for kids in self._kids.values() if epoch in kids)
                best = math.ceil(len(kids) / self._stop_worst)
                if len(kids) >= self._stop_worst and kid > kids[best - 1]:
                    self._worst[name] = (
                        f"after epoch {epoch} its KID of {kid:.4f} was not among the best {best} "
                        f"of {len(kids)} (stop_worst {self._stop_worst})"
                    )
                    self._jobs[name].stop()
                    break

    def _epochs(self) -> int:
        """How many epochs are done; of a run that has ended, all that it was told to do."""
        done = 0
        for name in self._sweep.runs:
            if name not in self._jobs and name not in self._waiting:
                done += self._sweep.told(name).epochs
            elif name in self._jobs:
                # A run that goes back deletes files under the eyes of who looks.
                with contextlib.suppress(OSError):
                    done += max(self._jobs[name].run.epochs("records"), default=0)
        return done

    def _text(self) -> str:
        done = len(self._sweep.runs) - len(self._jobs) - len(self._waiting)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{done}/{len(self._sweep.runs)} runs, {len(self._jobs)} training{failed}"


def _begun(url: str) -> bool:
    """Whether a run is to be resumed: not one that has ended before it had made anything."""
    try:
        refuse_taken(url)
    except RunError:
        return True
    return False
