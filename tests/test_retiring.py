"""A worker that is asked to leave: its ranks keep a checkpoint, and the job goes on without it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Client
from foreign import READY, ForeignCluster, started

from gan_lib.cluster.starting import close_cluster, connect
from gan_lib.jobs.job import Job
from gan_lib.jobs.launching import launch
from gan_lib.parameters import TrainingParameters


@pytest.fixture
def steady(tiny: TrainingParameters) -> TrainingParameters:
    """No end of its own, and no checkpoint but those of the ranks that leave."""
    never = 1_000_000
    return tiny.replace(epochs=never, max_images=320, checkpoint_every=never, sample_every=never)


def wait_until(condition: Callable[[], bool], what: str, job: Job, seconds: int = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert not job.done(), f"{what}: the job has ended: {job.error()!r}"
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        time.sleep(0.05)


def trains(job: Job, n_workers: int) -> Callable[[], bool]:
    def does() -> bool:
        told = job.run.info()
        since = (told.get("resumed") or {"epoch": 0})["epoch"]
        return told.get("world_size") == n_workers and max(job.run.epochs("records"), default=0) > (
            since + 1
        )

    return does


def check(job: Job, asked: int = 0) -> None:
    """Each iteration once; `asked` times workers were asked to leave, and nothing has failed."""
    # Where there is no checkpoint but that of the ranks that left.
    assert job.run.info()["resumed"]["epoch"] > 0
    job.stop(now=True)
    assert job.result(timeout=60)[0].stopped
    if asked:
        assert [said.partition(") ")[2] for said in job.restarts] == ["was asked to leave"] * asked
    iterations = job.run.records()["iteration"].tolist()
    assert iterations == list(range(1, len(iterations) + 1))


def both(theirs: ForeignCluster) -> Client:
    """A client of two workers, which may take long to start on a machine that is busy."""
    with Client(theirs.address) as plain:
        plain.wait_for_workers(2, timeout=180)
    return connect(theirs.address, 2)


def pids(client: Client, job: Job) -> tuple[int, int]:
    """The process of rank 0, and the one that has started it."""
    first = job.workers[:1]
    ((worker, parent),) = client.run(lambda: (os.getpid(), os.getppid()), workers=first).values()
    return worker, parent


def test_sigterm_takes_no_step_away(steady: TrainingParameters, tmp_path: Path) -> None:
    with started(tmp_path, nanny=True, environment=READY) as theirs:
        client = both(theirs)
        try:
            job = launch(client, steady, str(tmp_path / "run"), max_restarts=0, grace=0)
            wait_until(trains(job, 2), "training on two", job)
            _, nanny = pids(client, job)
            os.kill(nanny, signal.SIGTERM)
            wait_until(trains(job, 1), "training on one", job)
            check(job, asked=1)
        finally:
            close_cluster(client)


def retire(client: Client, job: Job) -> None:
    client.retire_workers(job.workers[:1])


def end_both(client: Client, job: Job) -> None:
    """As a batch system ends a job."""
    for pid in pids(client, job):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize("leave", [retire, end_both])
def test_each_way_to_be_asked(
    leave: Callable[[Client, Job], None], steady: TrainingParameters, tmp_path: Path
) -> None:
    with started(tmp_path, nanny=True, environment=READY) as theirs:
        client = both(theirs)
        try:
            job = launch(client, steady, str(tmp_path / "run"), max_restarts=0, grace=0)
            wait_until(trains(job, 2), "training on two", job)
            leave(client, job)
            wait_until(trains(job, 1), "training on one", job)
            check(job, asked=1)
        finally:
            close_cluster(client)


@pytest.mark.long
@pytest.mark.parametrize("nanny", [True, False])
def test_a_lifetime_and_a_worker_that_has_no_nanny(
    nanny: bool, steady: TrainingParameters, tmp_path: Path
) -> None:
    with started(tmp_path, n_workers=1, nanny=nanny, environment=READY) as theirs:
        # It is over while the job trains.
        if nanny:
            theirs.environment = {**READY, "DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION": "60s"}
        theirs.add_worker()
        client = both(theirs)
        try:
            job = launch(client, steady, str(tmp_path / "run"), max_restarts=0, grace=0)
            wait_until(trains(job, 2), "training on two", job)
            if not nanny:
                os.kill(pids(client, job)[0], signal.SIGTERM)
            wait_until(trains(job, 1), "training on one", job)
            check(job, asked=1)
        finally:
            close_cluster(client)
