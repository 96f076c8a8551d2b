"""Who gets onto a cluster, what its workers are given, and that nobody else's is changed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest
import torch
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Security
from foreign import started

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import ClusterError, WorkerLostError
from gan_lib.cli.profiles import check_parameters
from gan_lib.cluster import starting as cluster
from gan_lib.cluster import workers
from gan_lib.cluster.starting import close_cluster, connect, start_cluster
from gan_lib.cluster.workers import ask, find_places
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.jobs.rank_group import start_ranks
from gan_lib.parameters import TrainingParameters


def settings() -> dict[str, Any]:
    """On a worker: what it was given to train well."""
    names = ("OMP_NUM_THREADS", "TOKIO_WORKER_THREADS")
    more = ("TORCH_CPP_LOG_LEVEL", "CUDA_VISIBLE_DEVICES")
    options = ("distributed.worker.profile.enabled", "distributed.admin.tick.interval")
    told = {name: os.environ.get(name) for name in (*names, *more)} | {
        name: dask.config.get(name) for name in options
    }
    return told | {"threads": torch.get_num_threads()}


def told() -> tuple[int, dict[str, Any]]:
    """Which process that is, and its settings."""
    return os.getpid(), settings()


def test_workers_that_come_later_are_given_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    client = start_cluster(1)
    try:
        ((victim, first),) = ask(client, partial(client.run, told)).values()
        assert first["TOKIO_WORKER_THREADS"] == "1"
        assert first["threads"] == CPU_COUNT
        assert first["distributed.worker.profile.enabled"] is False
        assert client.cluster is not None
        os.kill(victim, signal.SIGKILL)
        client.cluster.scale(3)
        deadline = time.monotonic() + 60
        found: dict[int, dict[str, Any]] = {}
        while (len(found) < 3 or victim in found) and time.monotonic() < deadline:
            time.sleep(0.2)
            # One that is being replaced may never answer.
            with contextlib.suppress(WorkerLostError):
                answers = ask(
                    client, partial(client.run, told, on_error="ignore"), [*client.nthreads()]
                )
                found = dict(answers.values())
        # Each sees one GPU; all else is equal, and this process keeps its own.
        assert sorted(given.pop("CUDA_VISIBLE_DEVICES") for given in found.values()) == list("335")
        del first["CUDA_VISIBLE_DEVICES"]
        assert list(found.values()) == [first] * 3
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    finally:
        close_cluster(client)


def test_only_who_started_a_cluster_may_use_it(client: Client) -> None:
    address = client.scheduler.address
    with pytest.raises(ClusterError, match="wants certificates, and there are none"):
        connect(address)
    assert client.cluster is not None
    nannies = [nanny.address for nanny in client.cluster.workers.values()]
    for listens in (address, *nannies, *client.nthreads()):
        with pytest.raises(ClusterError, match="no Dask scheduler answers"):
            connect(listens.replace("tls://", "tcp://"))
        with pytest.raises(ClusterError, match="no Dask scheduler answers"):
            connect(listens, security=Security.temporary())


def test_what_is_left_of_a_failed_client_is_in_nobodys_way(client: Client) -> None:
    address = client.scheduler.address
    for _ in range(3):
        with pytest.raises(ClusterError, match="wants certificates"):
            connect(address)
        # Whatever memory is collected, and whenever: no client that failed is still open.
        left = [one for one in gc.get_objects() if issubclass(type(one), Client)]
        assert {one.status for one in left} <= {"running", "closed"}


def test_what_listens_and_never_answers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    dashboard = client.dashboard_link.removeprefix("http://").partition("/")[0]
    with pytest.raises(ClusterError, match=f"no Dask scheduler answers at 'tcp://{dashboard}'"):
        connect(f"tcp://{dashboard}")


def test_certificates_are_given_or_configured(client: Client, tmp_path: Path) -> None:
    address, security = client.scheduler.address, client.security
    close_cluster(connect(address, 2, security))
    settings = {}
    for name, content in (
        ("ca-file", security.tls_ca_file),
        ("client.key", security.tls_client_key),
        ("client.cert", security.tls_client_cert),
    ):
        path = tmp_path / name
        path.write_text(content)
        settings[f"distributed.comm.tls.{name}"] = str(path)
    with dask.config.set(settings):
        close_cluster(connect(address))
    # Neither has ended what it had not started.
    assert len(client.nthreads()) == 2


def test_a_cluster_without_workers_is_refused_and_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_WAIT_FOR_WORKERS", 0.5)
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as theirs,
        Client(theirs) as their_client,
    ):
        with pytest.raises(ClusterError, match="has no workers and 1 are needed: start more"):
            connect(theirs.scheduler_address)
        # The client of the call that failed is gone.
        assert set(theirs.scheduler.clients) <= {their_client.id, "fire-and-forget"}
        close_cluster(Client(theirs))
        assert theirs.status.name == "running"


def test_a_series_is_not_begun_without_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_WAIT_FOR_WORKERS", 0.5)
    with LocalCluster(
        n_workers=2, processes=False, protocol="tcp://", dashboard_address=None
    ) as theirs:
        told = {"address": theirs.scheduler_address}
        check_parameters(["04_distributed_training"], told)
        check_parameters(["04_distributed_training"], {**told, "n_workers": 2})
        with pytest.raises(ClusterError, match="2 workers and 5 are needed"):
            check_parameters(["04_distributed_training"], {**told, "n_workers": 5})
        theirs.scale(0)
        with pytest.raises(ClusterError, match="no workers"):
            check_parameters(["04_distributed_training"], told)


def test_too_few_or_impossible_numbers_of_workers(
    client: Client, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_WAIT_FOR_WORKERS", 0.5)
    with pytest.raises(ClusterError, match="2 workers and 5 are needed"):
        connect(client.scheduler.address, 5, client.security)
    for n in (0, -1):
        for call in (
            lambda n=n: start_cluster(n),
            lambda n=n: connect(client.scheduler.address, n, client.security),
            lambda n=n: launch(client, tiny, n_workers=n),
            lambda n=n: run_ranks(client, int, n_workers=n),
        ):
            with pytest.raises(ClusterError, match=f"n_workers is {n}"):
                call()


@pytest.fixture
def theirs() -> Iterator[LocalCluster]:
    """A cluster that somebody else made, in this process."""
    with LocalCluster(
        n_workers=1, processes=False, protocol="tcp://", dashboard_address=None
    ) as cluster:
        yield cluster


def test_a_cluster_object_and_a_scheduler_file(
    theirs: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps(theirs.scheduler.identity()))
    monkeypatch.chdir(tmp_path)
    for place in (theirs, file, str(file), "scheduler.json"):
        client = connect(place)
        assert client.scheduler.address == theirs.scheduler_address
        close_cluster(client)
        assert theirs.status.name == "running"
    # A notebook is run in a folder of its own.
    told = check_parameters(["04_distributed_training"], {"address": "scheduler.json"})
    assert told["address"] == theirs.scheduler_address
    monkeypatch.setattr(workers, "SECONDS_TO_WAIT_FOR_WORKERS", 0.5)
    with pytest.raises(ClusterError, match=r"1 workers and 2 are needed: .*cluster\.scale\(2\)"):
        connect(theirs, 2)


def test_what_is_no_cluster_is_told_so(
    theirs: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    file = tmp_path / "scheduler.json"
    with pytest.raises(ClusterError, match=r"no scheduler file .*dask scheduler --scheduler-file"):
        connect(file)
    for content in ("", "[1]", "{}", b"\xff"):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ClusterError, match=r"scheduler\.json is no file of `dask scheduler"):
            connect(str(file))
    with pytest.raises(ClusterError, match="is no file of `dask scheduler"):
        connect(f"{tmp_path}/")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        gone = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    file.write_text(json.dumps({"address": gone}))
    with pytest.raises(ClusterError, match=rf"at '{gone}', which is in .*scheduler\.json \("):
        connect(file)
    for wrong, named in ((42, "int"), (None, "NoneType"), (client, "Client")):
        with pytest.raises(ClusterError, match=f"was given a {named}: give the address"):
            connect(wrong)  # type: ignore[arg-type]
    theirs.close()
    with pytest.raises(ClusterError, match="this LocalCluster is closed: start another"):
        connect(theirs)


def test_behind_a_jupyterhub_the_dashboard_is_reached_through_its_proxy(
    theirs: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "distributed.dashboard.link"
    theirs.scheduler.services["dashboard"] = SimpleNamespace(port=8787, stop=lambda: None)
    with dask.config.set({name: dask.config.get(name)}):
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
        client = connect(theirs)
        # Another port, where somebody's dashboard has that one.
        assert re.fullmatch(r"/user/ann/proxy/127\.0\.0\.1:\d+/status", client.dashboard_link)
        close_cluster(client)
    # What somebody has configured stays.
    with dask.config.set({name: "elsewhere"}):
        close_cluster(connect(theirs))
        assert dask.config.get(name) == "elsewhere"


@pytest.mark.long
def test_the_link_leads_through_a_jupyter_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jupyter_server_proxy", reason="needs it: tests/clusters.sh")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # As a hub starts it, but for the hub.
    told = [f"--port={port}", "--ServerApp.base_url=/user/ann/", "--IdentityProvider.token=ann"]
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", *told]
    name = "distributed.dashboard.link"
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
    with (
        dask.config.set({name: dask.config.get(name)}),
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as server,
    ):
        client = start_cluster(1, device="cpu")
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
                time.sleep(0.2)
            url = f"http://127.0.0.1:{port}{client.dashboard_link}?token=ann"
            with urllib.request.urlopen(url) as page:
                assert "<title>Dask Diagnostic UI</title>" in page.read().decode()
        finally:
            close_cluster(client)
            server.terminate()


def test_a_closed_client_is_told_so(client: Client, tiny: TrainingParameters) -> None:
    closed = connect(client.scheduler.address, security=client.security)
    closed.close()
    with pytest.raises(ClusterError, match="the client is closed"):
        launch(closed, tiny)
    with pytest.raises(ClusterError, match="the client is closed"):
        run_ranks(closed, int)


def other_version(folder: Path) -> Path:
    """A folder from which another gan_lib is imported."""
    shutil.copytree(CHECKOUT / "gan_lib", folder / "gan_lib")
    shutil.copy(CHECKOUT / "data_manifest.json", folder)
    with (folder / "gan_lib" / "steps.py").open("a") as file:
        file.write("# of somebody else\n")
    return folder


def test_another_version_on_the_cluster_is_not_changed(tmp_path: Path) -> None:
    other = other_version(tmp_path / "other")
    with started(tmp_path, n_workers=0) as theirs:
        theirs.add_worker(path=[other])
        theirs.add_worker()  # where it could be uploaded to
        with Client(theirs.address) as plain:
            plain.wait_for_workers(2, timeout=60)
            with pytest.raises(ClusterError, match=r"worker tcp://\S+ has another version of gan_"):
                connect(theirs.address, 2)
            uploaded = "[p for p in __import__('sys').path if 'gan_lib' in p]"
            assert set(map(str, plain.run(eval, uploaded).values())) == {"[]"}
            assert plain.run_on_scheduler(eval, uploaded) == []


def test_each_attempt_compares_the_versions(tmp_path: Path) -> None:
    other = other_version(tmp_path / "other")
    # Where it is installed nothing is uploaded, and who comes later keeps what he has.
    with started(tmp_path, n_workers=1, path=[CHECKOUT]) as theirs:
        client = connect(theirs.address)
        try:
            theirs.add_worker(path=[other])
            client.wait_for_workers(2, timeout=60)
            places = find_places(client, 2, None)
            with pytest.raises(ClusterError, match="has another version of gan_lib"):
                start_ranks(client, places, "cpu", int, {})
        finally:
            client.close()
