"""Hosts of a network on this machine: network namespaces at a switch. On Linux, for root.

with hosts(2) as two:
    subprocess.Popen([*two.inside(0), "dask", "worker", ..., "--host", two.addresses[0]])
    two.plug(0, "down")
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

# What its network is called on each host.
INTERFACE = "fast0"


class Hosts:
    """Some hosts, and this machine beside them.

    Attributes:
        here: the address of this machine among them.
        addresses: of the hosts.
    """

    def __init__(self, n: int) -> None:
        pid = os.getpid()
        network = f"10.{200 + pid % 50}.{pid // 50 % 250}"
        self.here = f"{network}.1"
        self.addresses = [f"{network}.{2 + host}" for host in range(n)]
        self._switch = f"gan{pid}"
        # Of the hosts, and of the ports of the switch where they are plugged in.
        self._names = [f"gan{pid}-{host}" for host in range(n)]

    def inside(self, host: int) -> list[str]:
        """The command that runs the rest of its line on a host."""
        return ["ip", "netns", "exec", self._names[host]]

    def plug(self, host: int, state: str) -> None:
        """Pull the cable of a host, "down", or plug it in, "up"."""
        _run(f"ip link set {self._names[host]} {state}")

    def limit(self, host: int, mbit: float, queue_ms: int = 400) -> None:
        """From now on a host sends so many Mbit/s at most; what waits longer than that is lost."""
        limit = f"rate {mbit}mbit burst 256kb latency {queue_ms}ms"
        _run(f"tc -n {self._names[host]} qdisc add dev {INTERFACE} root tbf {limit}")

    def _make(self) -> None:
        _run(f"ip link add {self._switch} type bridge")
        _run(f"ip addr add {self.here}/24 dev {self._switch}")
        _run(f"ip link set {self._switch} up")
        for name, address in zip(self._names, self.addresses, strict=True):
            _run(f"ip netns add {name}")
            _run(f"ip link add {name} type veth peer name {INTERFACE} netns {name}")
            _run(f"ip link set {name} master {self._switch} up")
            _run(f"ip -n {name} addr add {address}/24 dev {INTERFACE}")
            _run(f"ip -n {name} link set {INTERFACE} up")
            _run(f"ip -n {name} link set lo up")

    def _remove(self) -> None:
        # Links first: with its namespace, a link goes some time later.
        for name in self._names:
            for command in (f"ip link delete {name}", f"ip netns delete {name}"):
                with contextlib.suppress(OSError):
                    _run(command)
        with contextlib.suppress(OSError):
            _run(f"ip link delete {self._switch}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{command}`: {done.stderr.strip()}")


@contextlib.contextmanager
def hosts(n: int) -> Iterator[Hosts]:
    """So many hosts, as long as the context lasts.

    Raises:
        OSError: if this machine cannot have them: it needs root, Linux and iproute2.
    """
    made = Hosts(n)
    try:
        made._make()
        yield made
    finally:
        made._remove()
