"""A Dask cluster that somebody else started, with nothing of gan_lib in it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# Has workers import what is slow before they are heard of: on a busy machine they are silent for
# so long meanwhile that they would be taken for lost.
READY = {"DASK_DISTRIBUTED__WORKER__PRELOAD": '["torch._dynamo", "pandas", "s3fs", "obstore"]'}


class ForeignCluster:
    """A scheduler and workers, each a process of its own.

    Args:
        folder: for what they write; the processes run in it.
        path: folders from which they may import, beside the installed packages.
        environment: of the workers, on top of this process's; None leaves a variable out.
        nanny: whether the workers have one.
        host: address of the scheduler.
    """

    def __init__(
        self,
        folder: Path,
        path: Sequence[Path] = (),
        environment: Mapping[str, str | None] | None = None,
        nanny: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.folder = folder
        self.path = path
        self.environment = environment or {}
        self.nanny = nanny
        self.processes: list[subprocess.Popen[bytes]] = []
        self._file = folder / "scheduler.json"
        self._start("scheduler", "--port", "0", "--host", host, path=path)
        deadline = time.monotonic() + 60
        while not self._file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.address: str = json.loads(self._file.read_text())["address"]

    def add_worker(
        self,
        path: Sequence[Path] | None = None,
        n_threads: int = 1,
        host: str = "127.0.0.1",
        inside: Sequence[str] = (),
    ) -> None:
        """Start one more; it joins within seconds.

        `host` is its address, and `inside` the command that runs others in its machine.
        """
        options = ["--nthreads", str(n_threads), "--local-directory", str(self.folder)]
        options += ["--host", host]
        options += ["--nanny" if self.nanny else "--no-nanny"]
        path = self.path if path is None else path
        self._start("worker", *options, path=path, inside=inside)

    def _start(
        self, name: str, *options: str, path: Sequence[Path] = (), inside: Sequence[str] = ()
    ) -> None:
        # -S leaves out the .pth file through which the checkout is installed.
        installed = [p for p in sys.path if p.endswith("site-packages")]
        told = {**os.environ, **self.environment} if name == "worker" else {**os.environ}
        told["PYTHONPATH"] = os.pathsep.join([*map(str, path), *installed])
        python = [sys.executable, "-S", "-m", f"distributed.cli.dask_{name}"]
        where = ["--scheduler-file", str(self._file), "--no-dashboard"]
        self.processes.append(
            subprocess.Popen(
                [*inside, *python, *where, *options],
                cwd=self.folder,
                env={name: value for name, value in told.items() if value is not None},
                stderr=subprocess.DEVNULL,
            )
        )

    def kill(self) -> None:
        """End it. How the processes part is not what is tested, and can take long."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@contextlib.contextmanager
def foreign_cluster(folder: Path) -> Iterator[str]:
    """A scheduler and two workers that were started without gan_lib; yields the address."""
    with started(folder) as cluster:
        yield cluster.address


@contextlib.contextmanager
def started(
    folder: Path,
    n_workers: int = 2,
    path: Sequence[Path] = (),
    environment: Mapping[str, str | None] | None = None,
    nanny: bool = False,
) -> Iterator[ForeignCluster]:
    """A `ForeignCluster` as long as the context lasts."""
    cluster = ForeignCluster(folder, path, environment, nanny)
    try:
        for _ in range(n_workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.kill()
