"""What the tests share: a real cluster of two processes, real images, a real S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from distributed import Client

from gan_lib.base.checkout import CHECKOUT
from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.hosts import Hosts, hosts
from gan_lib.practice.s3_server import serve_s3
from gan_lib.results import files

# Lines in place of bars: the tests' output is a log.
os.environ["GAN_LIB_HEADLESS"] = "1"
# Prepared images go where the tests' own process, its cluster and its notebooks find them,
# and away with it.
_CACHE = tempfile.TemporaryDirectory(prefix="gan-lib-cache-")
os.environ["GAN_LIB_CACHE"] = _CACHE.name
# The ranks of the cluster and the tests themselves share the cores.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)
    # The machine that `make gpu` is for may lack the package.
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.timeout(1200))
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="takes minutes: make test-all")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def mypy(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str] | None]:
    """mypy over the package, beside the tests that come before the one that wants its answer."""
    if not any("types_are" in item.name for item in request.session.items):
        yield None
        return
    command = ["nice", sys.executable, "-m", "mypy"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def tiny() -> TrainingParameters:
    """A training of seconds: 96 silhouettes of 16 pixels, 3 steps an epoch."""
    return TrainingParameters(
        image_size=16,
        channels=1,
        max_images=96,
        nz=16,
        ngf=8,
        ndf=8,
        epochs=4,
        batch_size=32,
        record_every=1,
        checkpoint_every=2,
        n_samples=16,
    )


@pytest.fixture(scope="session")
def silhouettes() -> ImageSet:
    return prepare_images("dog-silhouettes", 16, channels=1, max_images=96)


@pytest.fixture(scope="session")
def client(s3: str) -> Iterator[Client]:
    """A cluster of two workers, which find the S3 server in their environment."""
    client = start_cluster(2, device="cpu")
    yield client
    close_cluster(client)


@pytest.fixture
def own_client() -> Iterator[Client]:
    """A cluster for a test that breaks it."""
    client = start_cluster(2, device="cpu")
    yield client
    close_cluster(client)


@pytest.fixture
def two_hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts with addresses of their own; skips the test where there can be none.

    The parameter, if there is one, is the delay between them in milliseconds.
    """
    try:
        with hosts(2, getattr(request, "param", 0.0)) as made:
            yield made
    except OSError as error:
        pytest.skip(f"no hosts on this machine, which needs root and iproute2: {error}")


@pytest.fixture(autouse=True)
def runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a place of their own go to the test's folder, not into the checkout."""
    monkeypatch.setattr(files, "RUNS", str(tmp_path / "runs"))


@pytest.fixture
def killed_writer() -> Callable[[Path, str], Path]:
    """Kills a process while it writes a file into a folder; returns what it leaves there."""
    code = """
import os, signal, sys
from gan_lib.base import Folder

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
Folder(sys.argv[1]).write(sys.argv[2], b"never put in place")
"""

    def kill_one(folder: Path, path: str) -> Path:
        ended = subprocess.run([sys.executable, "-c", code, folder, path])
        assert ended.returncode == -signal.SIGKILL
        (left,) = folder.glob(f"{path}.*.part")
        return left

    return kill_one


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of a real S3 server on this machine, as an s3:// URL."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    # In the environment, and not in the URL: the cluster's workers inherit it.
    with serve_s3(folder):
        yield "s3://bucket"
