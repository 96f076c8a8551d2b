"""A training across two hosts, which are network namespaces with addresses of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from distributed import Client
from foreign import READY, ForeignCluster
from test_retiring import check, trains, wait_until

from gan_lib.cluster.starting import close_cluster, connect
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.hosts import INTERFACE, Hosts


@pytest.mark.long
@pytest.mark.parametrize("cut", [0, 1])
def test_a_host_is_cut_off_and_joins_again(
    cut: int, two_hosts: Hosts, tiny: TrainingParameters, tmp_path: Path
) -> None:
    theirs = ForeignCluster(tmp_path, environment=READY, nanny=True, host=two_hosts.here)

    def start(host: int) -> None:
        theirs.add_worker(host=two_hosts.addresses[host], inside=two_hosts.inside(host))

    try:
        for host in range(2):
            start(host)
        with Client(theirs.address) as plain:
            plain.wait_for_workers(2, timeout=300)
        client = connect(theirs.address, 2)
        try:
            # The one of Dask's address: the host's name may lead to loopback.
            assert run_ranks(client, os.getenv, key="GLOO_SOCKET_IFNAME") == [INTERFACE] * 2
            p = tiny.replace(epochs=1_000_000, max_images=320, sample_every=1_000_000)
            job = launch(client, p, str(tmp_path / "run"), grace=0)
            wait_until(trains(job, 2), "training across two hosts", job)
            two_hosts.limit(1, mbit=20, queue_ms=50)
            began, done = time.monotonic(), max(job.run.epochs("records"))
            wait_until(
                lambda: max(job.run.epochs("records")) > done + 1, "training over a slow link", job
            )
            print(f"two epochs over a slow link took {time.monotonic() - began:.1f} s")
            two_hosts.plug(cut, "down")
            wait_until(trains(job, 1), "training on the host that is left", job)
            two_hosts.plug(cut, "up")
            # Dask has ended the worker that did not reach its scheduler, and its nanny.
            start(cut)
            wait_until(trains(job, 2), "training across both again", job)
            used = {worker.split(":")[1].strip("/") for worker in job.workers}
            assert used == set(two_hosts.addresses)
            check(job)
        finally:
            close_cluster(client)
    finally:
        theirs.kill()
