"""Training that is left alone while everything around it fails: real processes, real files."""

from __future__ import annotations

import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from distributed import Client, Worker
from folders import add_greys
from foreign import foreign_cluster, started

from gan_lib.base.errors import RunError, WorkerLostError
from gan_lib.base.storage import Folder
from gan_lib.cluster import workers
from gan_lib.cluster.starting import close_cluster, connect, start_cluster
from gan_lib.jobs.job import Job
from gan_lib.jobs.launching import launch
from gan_lib.parameters import TrainingParameters
from gan_lib.results.checkpoints import Checkpoints
from gan_lib.results.run import Run, open_run

ENDLESS = 1_000_000


@pytest.fixture
def steady(tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch) -> TrainingParameters:
    """Ten steps an epoch, so that a fault meets the inside of one; no end of its own."""
    monkeypatch.setattr(workers, "SECONDS_OF_SILENCE", 10.0)  # for a test, on a quiet machine
    return tiny.replace(epochs=ENDLESS, max_images=320, sample_every=5, checkpoint_every=2)


def wait_until(condition: Callable[[], bool], what: str, job: Job | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if job is not None and job.done():
            raise AssertionError(f"{what}: the job has ended: {job.error()!r}")
        assert time.monotonic() < deadline, f"{what}: not after 120 s"
        time.sleep(0.05)


def last_epoch(run: Run) -> int:
    return max(run.epochs("records"), default=0)


def trains(job: Job) -> bool:
    return job.run.status().state == "training" and last_epoch(job.run) > 0


class Faults:
    """What can happen to a job; each does it and waits until the job trains again."""

    def __init__(self, client: Client, job: Job, rng: random.Random) -> None:
        self.client, self.job, self.rng = client, job, rng
        self.seconds: dict[str, list[float]] = {}

    def strike(self, name: str) -> None:
        """One fault, and the time until the job trains again."""
        job = self.job
        wait_until(lambda: trains(job), "training", job)
        # Not always at the same place of an epoch.
        time.sleep(self.rng.uniform(0.3, 1.5))
        print(f"{name}: {job!r}", flush=True)
        done = last_epoch(job.run)
        started = time.monotonic()
        getattr(self, name)()
        if name == "fill_disk":  # which may pass before anything has to start again
            wait_until(lambda: last_epoch(job.run) > done, name, job)
            wait_until(lambda: trains(job), name, job)
        self.seconds.setdefault(name, []).append(time.monotonic() - started)

    def _victim(self) -> int:
        """The process of one of the ranks."""
        worker = self.rng.choice(self.job.workers)
        return self.client.run(os.getpid, workers=[worker])[worker]

    def _until_it_trains_again(self, attempt: str) -> dict[str, Any]:
        """Wait for another attempt; what it says of where it goes on."""
        run = self.job.run

        def goes_on() -> bool:
            status = run.status()
            return status.state == "training" and status.job != attempt

        wait_until(goes_on, "another attempt", self.job)
        told = run.info()["resumed"]
        wait_until(lambda: last_epoch(run) > told["epoch"], "its first epoch", self.job)
        return told

    def _kill_and_notice(self) -> str:
        """Kill a worker and wait until the job knows; the name of the attempt that this ended."""
        attempt, restarts = self.job.run.status().job, len(self.job.restarts)
        os.kill(self._victim(), signal.SIGKILL)
        wait_until(lambda: len(self.job.restarts) > restarts, "the kill is noticed", self.job)
        return attempt

    def kill(self) -> None:
        run = self.job.run
        before, attempt = last_epoch(run), run.status().job
        os.kill(self._victim(), signal.SIGKILL)
        told = self._until_it_trains_again(attempt)
        # One interval, and what was waiting to be written.
        assert told["epoch"] >= before - run.parameters.checkpoint_every - 2
        assert told["damaged"] == []

    def kill_all(self) -> None:
        pids = self.client.run(os.getpid).values()
        # Asked as late as can be: an attempt that only starts may come as far as to train.
        attempt = self.job.run.status().job
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._until_it_trains_again(attempt)

    def kill_again(self) -> None:
        """Once more while the ranks of the next attempt are starting."""
        self._kill_and_notice()
        time.sleep(self.rng.uniform(0, 3))
        self.kill_all()

    def suspend(self) -> None:
        attempt = self.job.run.status().job
        os.kill(self._victim(), signal.SIGSTOP)
        self._until_it_trains_again(attempt)

    def cut(self) -> None:
        def lose_the_scheduler(dask_worker: Worker) -> None:
            dask_worker.loop.call_later(0.1, dask_worker.batched_stream.comm.abort)

        attempt = self.job.run.status().job
        self.client.run(lose_the_scheduler, workers=[self.rng.choice(self.job.workers)])
        self._until_it_trains_again(attempt)

    def fill_disk(self) -> None:
        def limit_files(n_bytes: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

        # Every write then fails as on a full disk, but only on this worker.
        first = [self.job.workers[0]]
        self.client.run(limit_files, 0, workers=first)
        time.sleep(self.rng.uniform(1, 5))
        self.client.run(limit_files, resource.RLIM_INFINITY, workers=first)

    def corrupt(self) -> None:
        run = self.job.run
        wait_until(lambda: len(run.epochs("checkpoints")) >= 2, "two checkpoints", self.job)
        attempt = self._kill_and_notice()
        newest = Checkpoints(Folder(run.url)).positions()[-1]
        path = f"{run.url}/{newest.path}"
        with fsspec.open(path, "rb") as file:
            data = bytearray(file.read())
        data[len(data) // 2] ^= 255
        with fsspec.open(path, "wb") as file:
            file.write(data)
        told = self._until_it_trains_again(attempt)
        assert told["epoch"] < newest.epochs
        assert "checksum" in told["damaged"][0]


def check_records(run: Run) -> None:
    """Each iteration once, each picture and the last checkpoint there, nothing half written."""
    records = run.records()
    epochs = records["epoch"].max()
    assert records["iteration"].tolist() == list(range(1, 10 * epochs + 1))
    due = {1, epochs, *range(5, epochs + 1, 5)}
    # A run that was stopped has a picture of its last epoch too.
    assert due <= set(run.epochs("samples")) <= set(range(1, epochs + 1))
    assert run.epochs("checkpoints")[-1] == epochs
    assert not [path for path in Folder(run.url).fs.find(run.url) if path.endswith(".part")]


def survive(place: str, p: TrainingParameters, faults: list[str], rng: random.Random) -> None:
    """Train through these faults, stop, and do the last two epochs on another cluster."""
    before = set(psutil.Process().children(recursive=True))
    client = start_cluster(2, device="cpu")
    try:
        job = launch(client, p, run=place, max_restarts=1000)
        hand = Faults(client, job, rng)
        for name in faults:
            hand.strike(name)
        for name, seconds in hand.seconds.items():
            median = statistics.median(seconds)
            print(f"{name}: {len(seconds)} times, training again after {median:.1f} s (median)")
        wait_until(lambda: trains(job), "training", job)
        job.stop()
        assert job.result(timeout=60)[0].stopped
        assert len(job.restarts) >= sum(name != "fill_disk" for name in faults)
        children = set(psutil.Process().children(recursive=True)) - before
    finally:
        close_cluster(client)
    # The resource tracker of multiprocessing serves all clusters of this process.
    alive = psutil.wait_procs(children, timeout=10)[1]
    assert not [process for process in alive if "tracker" not in str(process.cmdline())]
    check_records(open_run(place))
    client = start_cluster(1, device="cpu")
    try:
        run = open_run(place)
        done = last_epoch(run)
        assert run.resume(client, epochs=done + 2).result(timeout=60)[0].epochs == 2
        assert run.status().state == "finished"
    finally:
        close_cluster(client)
    check_records(open_run(place))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("GAN_LIB_FAULT_SEED", time.time()))
    print(f"GAN_LIB_FAULT_SEED={seed}")
    return random.Random(seed)


# A disk can be filled only where it is; the others are the same wherever the run is.
@pytest.mark.parametrize(
    "faults",
    [pytest.param(["suspend", "fill_disk"], marks=pytest.mark.long), ["corrupt"]],
    ids="-".join,
)
def test_one_of_each_fault(
    faults: list[str], steady: TrainingParameters, tmp_path: Path, s3: str, rng: random.Random
) -> None:
    rng.shuffle(faults)
    on_disk = "fill_disk" in faults
    place = str(tmp_path / "run") if on_disk else f"{s3}/run-{time.time_ns()}"
    survive(place, steady, faults, rng)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
def test_fifty_faults(
    part: int, steady: TrainingParameters, tmp_path: Path, s3: str, rng: random.Random
) -> None:
    names = ("kill", "kill_all", "kill_again", "suspend", "cut", "fill_disk", "corrupt")
    place = f"{s3}/run-{time.time_ns()}" if part % 2 else str(tmp_path / "run")
    survive(place, steady, rng.choices(names, (3, 1, 1, 1, 1, 1, 2), k=10), rng)


LAUNCH = """
import sys
from gan_lib import TrainingParameters, connect, launch, start_cluster

if __name__ == "__main__":
    place, address, *_ = [*sys.argv[1:], ""]
    client = connect(address) if address else start_cluster(2, device="cpu")
    parameters = TrainingParameters.from_json(sys.stdin.read())
    launch(client, parameters, run=place).result()
"""


def launch_elsewhere(folder: Path, p: TrainingParameters, *arguments: str) -> subprocess.Popen[Any]:
    script = folder / "launch_it.py"
    script.write_text(LAUNCH)
    process = subprocess.Popen([sys.executable, script, *arguments], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(p.to_json().encode())
    process.stdin.close()
    return process


def test_a_killed_client_leaves_a_run_that_goes_on(
    client: Client, steady: TrainingParameters, tmp_path: Path
) -> None:
    place = str(tmp_path / "run")
    process = launch_elsewhere(tmp_path, steady, place)
    wait_until(lambda: (tmp_path / "run" / "checkpoints").exists(), "a checkpoint")
    run = open_run(place)
    wait_until(lambda: len(run.epochs("checkpoints")) > 1, "two checkpoints")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    done = run.epochs("checkpoints")[-1]
    job = run.resume(client, epochs=done + 2)
    assert job.result(timeout=60)[0].epochs == 2
    check_records(run)


@pytest.mark.long
def test_a_killed_client_leaves_a_cluster_that_is_free(
    steady: TrainingParameters, tmp_path: Path
) -> None:
    place = str(tmp_path / "run")
    with foreign_cluster(tmp_path) as address:
        process = launch_elsewhere(tmp_path, steady, place, address)
        wait_until(lambda: (tmp_path / "run" / "checkpoints").exists(), "a checkpoint")
        run = open_run(place)
        process.kill()
        process.wait()
        wait_until(lambda: run.status().state == "stopped", "the ranks stop by themselves")
        # It stopped inside an epoch, with a checkpoint there.
        assert run.status().state == "stopped"
        done = last_epoch(run)
        client = connect(address)
        try:
            job = run.resume(client, n_workers=1, epochs=done + 1)
            job.result(timeout=100)
        finally:
            close_cluster(client)
    check_records(run)


def test_too_many_restarts_end_with_the_cause(
    own_client: Client, steady: TrainingParameters
) -> None:
    job = launch(own_client, steady, max_restarts=0)
    wait_until(lambda: trains(job), "training", job)
    pids = own_client.run(os.getpid)
    os.kill(pids[job.workers[1]], signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"worker process of rank 1 .* is gone"):
        job.result(timeout=60)
    assert job.status == "failed"
    assert "is gone" in job.run.status().error


def test_no_fewer_workers_than_wanted_go_on(steady: TrainingParameters, tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    with started(tmp_path) as cluster:
        client = connect(cluster.address, 2)
        try:
            job = launch(client, steady, place, min_workers=2, grace=0)
            wait_until(lambda: trains(job), "training", job)
            cluster.processes[1].kill()
            wait_until(lambda: len(job.restarts) == 1, "a restart", job)
            cluster.add_worker()
            wait_until(lambda: trains(job), "training on two", job)
            assert job.run.info()["world_size"] == 2
            job.stop()
            job.result(timeout=60)
            # Nobody else comes, and nobody is waited for.
            more = launch(client, steady, place, resume=True, min_workers=1, grace=0)
            wait_until(lambda: trains(more), "training", more)
            cluster.processes[2].kill()
            wait_until(lambda: len(more.workers) == 1 and trains(more), "training on one", more)
            assert more.run.info()["world_size"] == 1
            more.stop()
            more.result(timeout=60)
        finally:
            close_cluster(client)
    check_records(job.run)


def die_when_the_ranks_meet() -> None:
    from gan_lib.jobs import rank_task

    rank_task.TCPStore = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[misc]


def test_a_worker_that_is_killed_before_the_ranks_meet(
    own_client: Client, steady: TrainingParameters
) -> None:
    first = [min(own_client.run(os.getpid))]
    own_client.run(die_when_the_ranks_meet, workers=first)
    job = launch(own_client, steady.replace(epochs=2))
    # Where the others go on looking for it, they take part in no other attempt.
    assert len(job.result(timeout=100)) == 2
    assert len(job.restarts) == 1


def test_a_job_goes_on_with_the_images_with_which_it_began(
    own_client: Client, steady: TrainingParameters, tmp_path: Path
) -> None:
    source = tmp_path / "images"
    add_greys(source, range(320))
    told = steady.replace(source=str(source), max_images=0)
    job = launch(own_client, told, run=str(tmp_path / "run"))
    wait_until(lambda: trains(job), "training", job)
    (source / "319.png").unlink()
    Faults(own_client, job, random.Random(0)).kill()
    job.stop()
    job.result(timeout=60)
    run = job.run
    assert run.info()["images"] == 320
    before = [(tmp_path / "run" / name).read_bytes() for name in ("parameters.json", "status.json")]
    with pytest.raises(RunError, match=r"on 320 images, and the 319 .*new_images=True"):
        run.resume(own_client)
    after = [(tmp_path / "run" / name).read_bytes() for name in ("parameters.json", "status.json")]
    assert after == before
    done = run.positions()[-1].epochs
    more = run.resume(own_client, epochs=done + 2, new_images=True)
    assert len(more.result(timeout=60)) == 2
    assert run.info()["images"] == 319
    check_records(run)


def test_a_worker_that_joins_is_taken_in(steady: TrainingParameters, tmp_path: Path) -> None:
    client = start_cluster(1, device="cpu")
    try:
        job = launch(client, steady, run=str(tmp_path / "run"))
        wait_until(lambda: trains(job), "training", job)
        assert client.cluster is not None
        client.cluster.scale(2)
        wait_until(lambda: len(job.workers) == 2 and trains(job), "two ranks", job)
        assert job.restarts == []
        job.stop()
        job.result(timeout=60)
        assert job.run.info()["world_size"] == 2
    finally:
        close_cluster(client)
    check_records(job.run)
