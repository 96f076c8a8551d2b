"""The lines of docs/clusters.md, run for real on this machine: Slurm, SSH, Dask Gateway."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from foreign import READY
from slurm import Slurm, slurm
from test_retiring import pids, trains, wait_until

from gan_lib.base.checkout import CHECKOUT
from gan_lib.cli.profiles import read_profile
from gan_lib.cluster.starting import close_cluster
from gan_lib.jobs.job import Job
from gan_lib.parameters import TrainingParameters

pytestmark = pytest.mark.long
HERE = "127.0.0.1"
# What the workers are to find: this gan_lib also where the environment has another one, say.
FOUND = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **READY}


@pytest.fixture
def quick() -> TrainingParameters:
    """The quick profile, with no end before all has happened that is to."""
    told = read_profile("quick")
    known = {name: told[name] for name in told if name in TrainingParameters.names()}
    more = {
        "epochs": 1_000_000,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "sample_every": 1_000_000,
    }
    return TrainingParameters(**known).replace(quality_every=0, **more)


def run_lines(heading: str, told: Mapping[str, str], **names: Any) -> dict[str, Any]:
    """Execute the first Python lines below a heading; what they define.

    `told` has what a reader writes otherwise: text in the page -> text in its place.
    """
    page = (CHECKOUT / "docs" / "clusters.md").read_text()
    found = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    lines = found[1]
    for text, other in told.items():
        assert text in lines, text
        lines = lines.replace(text, other)
    exec(lines, names)
    return names


def says(job: Job, what: str) -> bool:
    """Whether that is why the job was started again, at least once."""
    return any(what in why for why in job.restarts)


def goes_on(job: Job) -> Callable[[], bool]:
    """Whether it trains on two workers, and has been interrupted before."""
    return lambda: job.run.info().get("resumed") is not None and trains(job, 2)()


def to_the_end(job: Job, client: Client) -> None:
    """Two more epochs, and it has finished; each iteration is recorded once."""
    job.stop()
    assert job.result(timeout=100)[0].stopped
    epochs = max(job.run.epochs("records")) + 2
    job = job.run.resume(client, epochs=epochs)
    assert not job.result(timeout=200)[0].stopped
    iterations = job.run.records()["iteration"].tolist()
    steps = job.run.info()["steps_per_epoch"]
    assert iterations == list(range(1, epochs * steps + 1))


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: tests/clusters.sh")
    for name, value in FOUND.items():
        monkeypatch.setenv(name, value)  # Slurm hands it on
    monkeypatch.chdir(tmp_path)  # where it writes what the jobs print
    with slurm(tmp_path / "slurm") as nodes:
        yield nodes


def slurm_lines(folder: Path, **told: str) -> dict[str, str]:
    """For two nodes of one core, and their network."""
    return {
        'job_extra_directives=["--gres=gpu:1"],': "",
        '"ib0"': '"lo"',
        "minimum=4, maximum=4": "minimum=2, maximum=2",
        "_workers(4": "_workers(2",
        "cluster, 4": "cluster, 2",
        '{"source": "...", "epochs": 300}': "parameters",
        "/shared/runs/first": f"{folder}/run",
        **told,
    }


def test_slurm_loses_a_node(nodes: Slurm, quick: TrainingParameters, tmp_path: Path) -> None:
    made = run_lines("Slurm", slurm_lines(tmp_path), parameters=quick)
    job, client = made["job"], made["client"]
    try:
        wait_until(trains(job, 2), "training on two nodes", job)
        nodes.lose("n2")
        wait_until(lambda: says(job, "is gone"), "the loss of a node", job)
        wait_until(trains(job, 1), "training on the one that is left", job)
        # Its worker was asked for anew meanwhile, and waits for a place.
        nodes.start("n2")
        wait_until(trains(job, 2), "training on two again", job)
        to_the_end(job, client)
    finally:
        close_cluster(client)
        made["cluster"].close()


def test_slurm_ends_all_jobs_at_their_walltime(
    nodes: Slurm, quick: TrainingParameters, tmp_path: Path
) -> None:
    lines = slurm_lines(
        tmp_path,
        **{"02:00:00": "00:03:00", ', "--lifetime", "110m", "--lifetime-stagger", "5m"': ""},
    )
    made = run_lines("Slurm", lines, parameters=quick)
    job, client = made["job"], made["client"]
    try:
        wait_until(trains(job, 2), "training on two nodes", job)
        wait_until(lambda: says(job, "was asked to leave"), "their walltime", job, 300)
        wait_until(goes_on(job), "training in other jobs", job)
        to_the_end(job, client)
    finally:
        close_cluster(client)
        made["cluster"].close()


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An SSH server on loopback for this user alone; the options that log in there."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if os.getuid() != 0 or not os.path.exists(server):
        pytest.skip("needs an SSH server, and root to start it: tests/clusters.sh installs it")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    with socket.create_server((HERE, 0)) as probe:
        port = probe.getsockname()[1]
    os.makedirs("/run/sshd", exist_ok=True)  # it does not start without
    told = {
        "ListenAddress": f"{HERE}:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "PasswordAuthentication": "no",
        "StrictModes": "no",  # the folder may be below one that everybody may write to
        "PidFile": "none",
    }
    options = [word for name, value in told.items() for word in ("-o", f"{name}={value}")]
    with subprocess.Popen([server, "-D", "-e", "-f", "/dev/null", *options]) as process:
        try:
            yield {"port": port, "client_keys": [str(tmp_path / "user")], "known_hosts": None}
        finally:
            process.terminate()


def test_a_worker_that_ssh_has_started_is_lost(
    sshd: dict[str, Any], quick: TrainingParameters, tmp_path: Path
) -> None:
    pytest.importorskip("asyncssh", reason="needs asyncssh: tests/clusters.sh")
    python = tmp_path / "python"
    given = "\n".join(f"export {name}='{value}'" for name, value in FOUND.items())
    python.write_text(f'#!/bin/sh\n{given}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    told = {
        '"login", "node1", "node2"': f'"{HERE}", "{HERE}", "{HERE}"',
        '{"known_hosts": None},': f"""{sshd!r},
    scheduler_options={{"host": "{HERE}"}},""",
        "/shared/dogs/.venv/bin/python": str(python),
        '{"source": "...", "epochs": 300}': "parameters",
        "/shared/runs/first": f"{tmp_path}/run",
    }
    made = run_lines("SSH", told, parameters=quick)
    job, client = made["job"], made["client"]
    try:
        wait_until(trains(job, 2), "training on two", job)
        for pid in reversed(pids(client, job)):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: says(job, "is gone"), "the loss of a worker", job)
        login = ["ssh", "-p", str(sshd["port"]), "-i", sshd["client_keys"][0], HERE]
        login[1:1] = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        worker = f"{python} -m distributed.cli.dask_worker {made['cluster'].scheduler_address}"
        another = subprocess.Popen([*login, f"{worker} --nthreads 1 --memory-limit 0"])
        wait_until(goes_on(job), "training on two again", job)
        to_the_end(job, client)
    finally:
        close_cluster(client)
        made["cluster"].close()
    another.wait(60)  # it ends with its scheduler


# Everybody may start processes as the user of the server: on loopback, and for a test.
GATEWAY = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.address = "127.0.0.1:{ports[0]}"
c.Proxy.address = "127.0.0.1:{ports[1]}"
c.UnsafeLocalBackend.clusters_directory = "{folder}/clusters"
c.UnsafeLocalBackend.cluster_start_timeout = c.UnsafeLocalBackend.worker_start_timeout = 300
c.ClusterConfig.scheduler_cmd = ["{python}", "-m", "distributed.cli.dask_scheduler"]
c.ClusterConfig.worker_cmd = ["{python}", "-m", "distributed.cli.dask_worker"]
c.ClusterConfig.environment = {environment}
c.ClusterConfig.worker_memory = "8 G"
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    """The address of a server of Dask Gateway, which starts clusters as processes."""
    for name in ("dask_gateway", "dask_gateway_server", "sqlalchemy"):
        pytest.importorskip(name, reason="needs dask-gateway-server: tests/clusters.sh")
    probes = [socket.create_server((HERE, 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    config = tmp_path / "config.py"
    told = {"ports": ports, "folder": tmp_path, "python": sys.executable, "environment": FOUND}
    config.write_text(GATEWAY.format(**told))
    code = "from dask_gateway_server.app import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, "-f", config], cwd=tmp_path) as server:
        try:
            address, deadline = f"http://{HERE}:{ports[1]}", time.monotonic() + 60
            while time.monotonic() < deadline:
                # The proxy is there before the server is.
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/api/health").close()
                    break
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def test_dask_gateway_loses_a_worker(
    gateway: str, quick: TrainingParameters, tmp_path: Path
) -> None:
    told = {
        "https://gateway.example": gateway,
        "adapt(minimum=4, maximum=4)": "adapt(minimum=2, maximum=2)",
        "_workers(4": "_workers(2",
        "cluster, 4": "cluster, 2",
        '{"source": "...", "epochs": 300}': "parameters",
        "s3://BUCKET/runs/first": f"{tmp_path}/run",
    }
    made = run_lines("Dask Gateway", told, parameters=quick)
    job, client = made["job"], made["client"]
    try:
        wait_until(trains(job, 2), "training on two", job)
        os.kill(pids(client, job)[0], signal.SIGKILL)
        wait_until(lambda: says(job, "is gone"), "the loss of a worker", job)
        wait_until(goes_on(job), "training on two again", job)
        to_the_end(job, client)
    finally:
        close_cluster(client)
        made["cluster"].shutdown()
