"""Ctrl-C and SIGTERM while images are prepared: nothing is left running, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import psutil
import pytest
from distributed import Client, Worker
from fault_proxy import fault_proxy
from PIL import Image

from gan_lib.data import images, shards
from gan_lib.data.image_set import open_prepared
from gan_lib.data.images import prepare_images
from gan_lib.data.prepared import INDEX
from gan_lib.data.shards import Work

N = 200
# What is interrupted; the cluster is there before and closed after, as in a script of a user.
PREPARE = """
import sys
from gan_lib.data import shards
from gan_lib.data import prepare_images

if __name__ == "__main__":
    source, cache, where = sys.argv[1:]
    shards.SMALLEST_SHARD = 20 * shards.COST_OF_FILE
    client = None
    if where == "on a cluster":
        from gan_lib.cluster import close_cluster, start_cluster

        client = start_cluster(2, device="cpu")
    print("begin", flush=True)
    prepare_images(source, 32, cache=cache, client=client)
    print("end", flush=True)
    if client is not None:
        close_cluster(client)
"""
MOMENTS = [
    pytest.param(("here", 1), id="here"),
    pytest.param(("on a cluster", 1), id="on a cluster"),
    pytest.param(("here", 20), id="here-20", marks=pytest.mark.long),
    pytest.param(("on a cluster", 20), id="on a cluster-20", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that take some ten milliseconds each."""
    folder = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(256, size=(400, 500, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "000.png")
    for i in range(1, N):
        os.link(folder / "000.png", folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PREPARE."""
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 20 * shards.COST_OF_FILE)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that this process makes."""
    names: list[str] = []
    original = images.make_shard

    def noted(work: Work, url: str) -> object:
        names.append(work.name)
        return original(work, url)

    monkeypatch.setattr(images, "make_shard", noted)
    return names


def left_running(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and process.info["status"] != "zombie":
                found.append(process.pid)
    return found


def count_running(dask_worker: Worker) -> int:
    """Tasks that a worker has begun and not ended, also those that were cancelled meanwhile."""
    return dask_worker.state.executing_count


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what is to come about by itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_at_random_moments(
    moments: tuple[str, int],
    number: signal.Signals,
    photographs: Path,
    tmp_path: Path,
    small_shards: None,
    made: list[str],
) -> None:
    where, n = moments
    expected = prepare_images(str(photographs), 32, cache=str(tmp_path / "expected")).checksum()
    n_shards = len(made)
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)
    for moment in range(n):
        cache = tmp_path / str(moment)
        process = subprocess.Popen(
            [sys.executable, str(script), str(photographs), str(cache), where],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert "begin\n" in iter(process.stdout.readline, "")
        time.sleep(random.uniform(0, 1))
        if number == signal.SIGINT:
            # A terminal sends it to all processes, those of the cluster too.
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode or "end" in said, said
        wait_until(lambda session=process.pid: not left_running(session))
        done = len(list(cache.rglob("shard_*.json")))
        if where == "here":
            assert not list(cache.rglob("*.part"))
        # What it claims is so.
        for index in cache.rglob(INDEX):
            assert open_prepared(str(index.parent)).checksum() == expected
            done = n_shards
        made.clear()
        again = prepare_images(str(photographs), 32, cache=str(cache))
        assert again.checksum() == expected
        assert len(made) == n_shards - done
        assert not list(cache.rglob("*.part"))


def test_the_tasks_of_a_cluster_are_cancelled(
    client: Client, photographs: Path, tmp_path: Path, small_shards: None
) -> None:
    def made() -> int:
        return len(list(tmp_path.rglob("shard_*.json")))

    def interrupt() -> None:
        wait_until(lambda: made() > 0)
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(interrupt)
        prepare_images(str(photographs), 32, cache=str(tmp_path), client=client)
    # Those that had begun end by themselves; no other begins.
    wait_until(lambda: not any(client.processing().values()))
    wait_until(lambda: not any(client.run(count_running).values()))
    n_made = made()
    assert not list(tmp_path.rglob(INDEX))
    whole = prepare_images(str(photographs), 32, cache=str(tmp_path), client=client)
    assert n_made < len(json.loads(Path(whole.prepared, INDEX).read_text())["shards"])


WAIT_FOR_A_STORE = """
import sys
from gan_lib.sources import fetching
from gan_lib.data import prepare_images

fetching.PAUSES = (600,)
prepare_images(sys.argv[1], 16, storage_options={"endpoint_url": sys.argv[2]}, cache=sys.argv[3])
"""


def test_nobody_waits_for_a_store_that_is_slow(photographs: Path, s3: str, tmp_path: Path) -> None:
    place = f"{s3}/interrupted-{time.time_ns()}"
    fsspec.filesystem("s3").pipe_file(f"{place}/a.png", (photographs / "000.png").read_bytes())
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with fault_proxy(port) as proxy:
        proxy.faults = {"a.png": "503"}
        command = [sys.executable, "-c", WAIT_FOR_A_STORE, place, proxy.url, str(tmp_path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: proxy.seen["a.png"] > 0)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in said
