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

from gan_lib.practice.cables import lay

# What its network is called on each host.
INTERFACE = "fast0"


class Hosts:
    """Some hosts, and this machine beside them.

    Attributes:
        here: the address of this machine among them.
        addresses: of the hosts.
    """

    def __init__(self, n: int, delay_ms: float = 0.0) -> None:
        pid = os.getpid()
        self._network = network = f"10.{200 + pid % 50}.{pid // 50 % 250}"
        self.here = f"{network}.1"
        self.addresses = [f"{network}.{2 + host}" for host in range(n)]
        self._switch = f"gan{pid}"
        # Of the hosts, and of the ports of the switch where they are plugged in.
        self._names = [f"gan{pid}-{host}" for host in range(n)]
        # Between two hosts there are two cables.
        self._delay = delay_ms / 2 / 1000
        self._cables: list[subprocess.Popen[bytes]] = []

    def inside(self, host: int) -> list[str]:
        """The command that runs the rest of its line on a host."""
        return ["ip", "netns", "exec", self._names[host]]

    def plug(self, host: int, state: str) -> None:
        """Pull the cable of a host, "down", or plug it in, "up"."""
        _run(f"ip link set {self._names[host]} {state}")

    def limit(self, host: int, mbit: float, queue_ms: int = 400) -> None:
        """From now on a host sends so many Mbit/s at most; what waits longer than that is lost."""
        # The burst is one of the packets of up to 64 KB that TCP hands to its device, and little
        # more: what a pause has saved up makes messages quicker than the rate.
        limit = f"rate {mbit}mbit burst 80kb latency {queue_ms}ms"
        _run(f"tc -n {self._names[host]} qdisc add dev {INTERFACE} root tbf {limit}")

    def _make(self) -> None:
        _run(f"ip link add {self._switch} type bridge")
        _run(f"ip addr add {self.here}/24 dev {self._switch}")
        _run(f"ip link set {self._switch} up")
        for name, address in zip(self._names, self.addresses, strict=True):
            _run(f"ip netns add {name}")
            if self._delay:
                self._cables.append(lay(name, f"{name}h", self._delay))
                _run(f"ip link set {name}h netns {name} name {INTERFACE}")
            else:
                _run(f"ip link add {name} type veth peer name {INTERFACE} netns {name}")
            _run(f"ip link set {name} master {self._switch} up")
            _run(f"ip -n {name} addr add {address}/24 dev {INTERFACE}")
            _run(f"ip -n {name} link set {INTERFACE} up")
            _run(f"ip -n {name} link set lo up")
            # Of TCP's ways to pace what it sends the one that every kernel has. BBR, which may be
            # this machine's choice, sends short messages with pauses at what it takes for slower.
            _run(f"ip -n {name} route replace {self._network}.0/24 dev {INTERFACE} congctl reno")

    def _remove(self) -> None:
        # Links first: with its namespace, a link goes some time later.
        for cable in self._cables:
            cable.communicate()
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
def hosts(n: int, delay_ms: float = 0.0) -> Iterator[Hosts]:
    """So many hosts, as long as the context lasts.

    What one sends to another arrives `delay_ms` later; what it sends here, after half of that.

    Raises:
        OSError: if this machine cannot have them: it needs root, Linux and iproute2, and for a
            delay /dev/net/tun.
    """
    made = Hosts(n, delay_ms)
    try:
        made._make()
        yield made
    finally:
        made._remove()
