"""What a launch leaves behind: one run, or nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client
from foreign import started

from gan_lib.base.errors import RunError, SourceError, UserError
from gan_lib.base.storage import Folder
from gan_lib.cluster.starting import close_cluster, connect, start_cluster
from gan_lib.data.checking import check_source
from gan_lib.jobs import job as jobs
from gan_lib.jobs.job import Job
from gan_lib.jobs.launching import launch
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.photographs import make_photographs
from gan_lib.results.run import open_run
from gan_lib.results.writing import RunWriter, create_run


def until_it_trains(job: Job) -> None:
    deadline = time.monotonic() + 60
    while not job.run.epochs("records"):
        assert not job.done(), job.error()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def content(url: str) -> dict[str, bytes]:
    """All files of a run that do not change while it trains."""
    folder = Folder(url)
    return {name: folder.read(name) for name in folder.names("") if name.endswith(".json")}


RACE = """
import sys
from gan_lib import TrainingParameters
from gan_lib.base.errors import RunError
from gan_lib.results.writing import create_run

print("ready", flush=True)
for place in map(str.strip, sys.stdin):
    try:
        create_run(place, TrainingParameters(seed=int(sys.argv[1])))
        print("got it", flush=True)
    except RunError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("where", ["disk", "store"])
def test_of_two_that_reserve_one_place_one_gets_it(
    where: str, tmp_path: Path, s3: str, tiny: TrainingParameters
) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        for n in range(8 if where == "store" else 20):
            place = f"{s3}/{time.time_ns()}" if where == "store" else str(tmp_path / str(n))
            if n % 2:
                # A run that failed before it had made anything gives its place back, to one.
                create_run(place, tiny)
                RunWriter(place).set_status("failed")
            else:
                # rclone never ends two uploads at once into a folder that is new.
                RunWriter(place).write("here", b"")
            for racer in racers:
                racer.stdin.write(f"{place}\n")
            said = [racer.stdout.readline() for racer in racers]
            assert sorted(words == "got it\n" for words in said) == [False, True], said
            assert any("already holds a run" in words for words in said)
            run = open_run(place)
            assert run.parameters.seed == said.index("got it\n") + 1
            assert run.status().state == "waiting"
            assert not [name for name in Folder(place).names("") if "claim" in name]
    finally:
        for racer in racers:
            racer.communicate()


LAUNCH = """
import sys
from gan_lib import TrainingParameters, launch, start_cluster

if __name__ == "__main__":
    client = start_cluster(1, device="cpu")
    print("launching", flush=True)
    launch(client, TrainingParameters.from_json(sys.argv[1]), run=sys.argv[2])
    print("launched", flush=True)
"""


def interrupt_a_launch(
    folder: Path, number: int, p: TrainingParameters, seconds: float | None = None
) -> None:
    """Interrupt one after so many seconds; if None, while the images are prepared."""
    place, cache, script = folder / "run", folder / "cache", folder / "launch_it.py"
    script.write_text(LAUNCH)
    process = subprocess.Popen(
        [sys.executable, script, p.to_json(), place],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "GAN_LIB_CACHE": str(cache)},
    )  # fmt: skip
    assert process.stdout.readline() == "launching\n"
    while seconds is None and not list(cache.glob("prepared/*/*.lock")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds or 0)
    process.send_signal(number)
    launched = "launched\n" in process.communicate(timeout=60)[0]
    assert process.returncode != 0 or launched
    # A run that was reserved says how it ended; one that was not is not there.
    if seconds is not None and (place / "parameters.json").exists():
        assert open_run(str(place)).status().state in ("stopped", "interrupted")
    else:
        assert not launched
        assert not place.exists()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    make_photographs(folder, 12)
    return folder


def test_an_interrupted_preparation_gives_its_place_back(
    client: Client, tiny: TrainingParameters, photographs: Path, tmp_path: Path
) -> None:
    for path in list(photographs.rglob("*.jpg")):
        for n in range(100):  # so that it takes a second or two
            os.link(path, path.with_name(f"{n}-{path.name}"))
    p = tiny.replace(source=str(photographs), max_images=0, channels=3, epochs=1)
    interrupt_a_launch(tmp_path, signal.SIGINT, p)
    assert launch(client, p, run=str(tmp_path / "run")).result()[0].epochs == 1


@pytest.mark.long
def test_a_launch_that_is_interrupted_at_any_moment(
    client: Client, tiny: TrainingParameters, photographs: Path, tmp_path: Path
) -> None:
    p = tiny.replace(source=str(photographs), max_images=0, channels=3, batch_size=4)
    p = p.replace(epochs=100_000)
    for n in range(20):
        folder = tmp_path / str(n)
        folder.mkdir()
        number = (signal.SIGINT, signal.SIGTERM)[n % 2]
        interrupt_a_launch(folder, number, p, random.uniform(0, 5))
        made = any((folder / "run" / kind).exists() for kind in ("records", "checkpoints"))
        job = launch(client, p, run=str(folder / "run"), resume=made)
        until_it_trains(job)
        job.stop(now=True)
        assert job.result(timeout=60)[0].stopped


def test_a_job_that_was_parted_from_is_not_started_again(
    own_client: Client, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS_TO_PART", 0.0)
    job = launch(own_client, tiny.replace(epochs=100_000))
    until_it_trains(job)
    workers = own_client.run(os.getpid).values()
    job.abandon()
    # As a cluster does that ends with its process.
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunError, match="this one ends here"):
        job.result(timeout=60)
    assert job.run.status().state == "interrupted"


def test_keys_that_the_workers_lack(
    s3: str, client: Client, tiny: TrainingParameters, photographs: Path, tmp_path: Path
) -> None:
    lacking = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    source = f"{s3}/photographs-{time.time_ns()}"
    Folder(source).fs.put(str(photographs), source, recursive=True)
    p = tiny.replace(source=source, max_images=0, channels=3, batch_size=4)
    place = f"{s3}/run-{time.time_ns()}"
    job = launch(client, p.replace(epochs=100_000), run=place)
    until_it_trains(job)
    before = content(place)
    with started(tmp_path, environment=dict.fromkeys(lacking)) as cluster:
        theirs = connect(cluster.address, 2)
        try:
            lacks = r"the worker tcp://\S+.* lacks AWS_ACCESS_KEY_ID, AWS_SECRET_.*start the"
            # Seen before anything is prepared or written.
            other = p.replace(image_size=32)
            with pytest.raises(SourceError, match=lacks):
                launch(theirs, other, run=str(tmp_path / "other"))
            assert not (tmp_path / "other").exists()
            # The job of others, and what it was told, are left alone.
            with pytest.raises(RunError, match=lacks):
                job.run.resume(theirs, source=source, epochs=200_000)
            with pytest.raises(RunError, match=lacks):
                launch(theirs, p, run=f"{s3}/new-{time.time_ns()}")
            assert {**content(place), "status.json": b""} == {**before, "status.json": b""}
            assert job.status == "training"
            # Keys that come later are taken.
            theirs.run(lambda: os.environ.update(lacking))
            assert launch(theirs, other.replace(epochs=1), run=str(tmp_path / "other")).result()
        finally:
            theirs.close()
    job.stop(now=True)
    assert job.result(timeout=60)[0].stopped
    assert job.restarts == []


def test_an_endpoint_without_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder(s3).write("closed/image.jpg", b"")
    check_source(f"{s3}/closed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    Folder(s3).fs.clear_instance_cache()
    with pytest.raises(SourceError, match=r"set AWS_ACCESS_KEY_ID and .*there are no keys") as said:
        check_source(f"{s3}/closed")
    assert "storage_options" not in str(said.value)
    Folder(s3).fs.clear_instance_cache()


class Side:
    """One of two that use the same places: a cluster of its own, and the job that it started."""

    def __init__(self) -> None:
        self.client = start_cluster(1, device="cpu")
        self.job: Job | None = None

    def start(self, place: str, p: TrainingParameters, resume: bool = False) -> None:
        """Launch or resume a run; its cluster has one worker, so its last job ends before."""
        self.end()
        self.job = launch(self.client, p, run=place, resume=resume)

    def end(self) -> None:
        """End its job, if it goes on, in whatever way it ends."""
        if self.job is not None:
            self.job.stop(now=True)
            with contextlib.suppress(RunError):
                self.job.result(timeout=60)
            self.job = None


def owner(place: str) -> str:
    """Which job has a run, without the attempt."""
    return open_run(place).status().job.partition("-")[0]


@pytest.mark.long
def test_two_clusters_with_each_others_runs(
    tiny: TrainingParameters, s3: str, photographs: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("GAN_LIB_FAULT_SEED", time.time()))
    print(f"GAN_LIB_FAULT_SEED={seed}")
    rng = random.Random(seed)
    places = [str(tmp_path / "run"), f"{s3}/run-{time.time_ns()}"]
    p = tiny.replace(source=str(photographs), max_images=0, channels=3, batch_size=4)
    told = {place: p.replace(seed=n, epochs=100_000) for n, place in enumerate(places)}
    sides = [Side(), Side()]
    try:
        for side, place in zip(sides, places, strict=True):
            side.start(place, told[place])
        for _ in range(60):
            time.sleep(rng.uniform(0, 2))
            side, place = rng.choice(sides), rng.choice(places)
            what = rng.choice(["launch", "resume", "resume", "stop", "stop now"])
            print(f"side {sides.index(side)}, run {places.index(place)}: {what}", flush=True)
            before = {url: owner(url) for url in places}
            if what == "launch":
                with pytest.raises(UserError, match=r"already holds a run|train for another"):
                    launch(side.client, told[place].replace(seed=7), run=place)
            elif what == "resume":
                side.start(place, told[place], resume=True)
                assert owner(place) == side.job._supervisor.name
                del before[place]
            else:
                open_run(place).stop(now=what == "stop now")
            assert {url: owner(url) for url in before} == before
        for side in sides:
            side.end()
    finally:
        for side in sides:
            close_cluster(side.client)
    for place in places:
        run = open_run(place)
        assert run.parameters == told[place]
        assert run.status().state == "stopped", run.status()
        records = run.records()
        assert records["iteration"].tolist() == list(range(1, len(records) + 1))
        assert run.checkpoint()["parameters"] == told[place].to_dict()
