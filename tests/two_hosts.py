"""Two hosts on one machine: this one, and a network namespace with an address of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE, THERE, SCHEDULER, WORKER = "10.97.31.1", "10.97.31.2", 18786, 19000
# What a firewall does that lets Dask's ports through and no others.
FIREWALL = """
table inet firewall {
  chain in { type filter hook input priority 0; tcp dport 32768-65535 tcp flags & (syn|ack) == syn drop; }
  chain out { type filter hook output priority 0; tcp dport 32768-65535 tcp flags & (syn|ack) == syn drop; }
}
"""  # noqa: E501


class TwoHosts:
    """A worker on each, and their scheduler here, at `address`."""

    address = f"tcp://{HERE}:{SCHEDULER}"

    def __init__(self, name: str) -> None:
        self._inside = ["ip", "netns", "exec", name]

    def close_ports(self) -> None:
        """From now on no new connection comes into or out of the other host but to Dask's."""
        subprocess.run([*self._inside, "nft", "-f", "-"], input=FIREWALL, text=True, check=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Skips the test where they cannot be had."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("nft")):
        pytest.skip("two hosts need root, iproute2 and nftables")
    name = f"gan-lib-{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    up = [
        f"ip netns add {name}",
        f"ip link add gan-here type veth peer name gan-there netns {name}",
        f"ip addr add {HERE}/24 dev gan-here",
        "ip link set gan-here up",
        f"ip -n {name} addr add {THERE}/24 dev gan-there",
        f"ip -n {name} link set gan-there up",
        f"ip -n {name} link set lo up",
    ]
    processes = []
    try:
        for command in up:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        dask = [sys.executable, "-m", "distributed.cli.dask_"]
        ports = ["--port", str(SCHEDULER), "--host", HERE, "--no-dashboard"]
        worker = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--worker-port", str(WORKER)]
        told = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, "cwd": folder}
        for before, command, *more in (
            ([], "scheduler", *ports),
            ([], "worker", TwoHosts.address, "--host", HERE, *worker),
            (inside, "worker", TwoHosts.address, "--host", THERE, *worker),
        ):
            line = [*before, *dask[:-1], f"{dask[-1]}{command}", *more]
            processes.append(subprocess.Popen(line, stderr=subprocess.DEVNULL, **told))
        yield TwoHosts(name)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
