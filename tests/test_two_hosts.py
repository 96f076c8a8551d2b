"""A training across two hosts, which are network namespaces with addresses of their own."""

from __future__ import annotations

import os
import subprocess
import sys
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

DELAY_MS = 20.0
PORT = 5000
# What a host does that is called: it says the first byte at once, and everything at the end.
ECHO = f"""
import socket, sys

with socket.create_server((sys.argv[1], {PORT})) as door:
    print("open", flush=True)
    caller, _ = door.accept()
    heard = caller.recv(1)
    caller.sendall(heard)
    caller.sendall(heard + caller.makefile("rb").read())
    caller.close()
"""
# And the one that calls.
CALL = f"""
import os, socket, sys, time

said = os.urandom(2**20)
with socket.create_connection((sys.argv[1], {PORT})) as call:
    began = time.monotonic()
    call.sendall(said[:1])
    assert call.recv(1) == said[:1]
    print(time.monotonic() - began)
    call.sendall(said[1:])
    call.shutdown(socket.SHUT_WR)
    assert call.makefile("rb").read() == said
    print(time.monotonic() - began)
"""


@pytest.mark.parametrize("two_hosts", [DELAY_MS], indirect=True)
def test_what_is_sent_arrives_whole_and_not_before_its_time(two_hosts: Hosts) -> None:
    two_hosts.limit(1, mbit=8)
    python, address = [sys.executable, "-c"], two_hosts.addresses[0]
    listen = [*two_hosts.inside(0), *python, ECHO, address]
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout and echo.stdout.readline() == "open\n"
        call = [*two_hosts.inside(1), *python, CALL, address]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        echo.kill()
    assert done.returncode == 0, done.stderr
    first, whole = map(float, done.stdout.split())
    assert first >= 2 * DELAY_MS / 1000
    # A megabyte at the rate of the one that calls, but for a burst.
    assert whole >= 0.9 * 2**20 * 8 / 8e6


@pytest.mark.long
@pytest.mark.parametrize("two_hosts", [DELAY_MS], indirect=True)
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
