"""Memory in which the ranks of one machine add up their gradients, and what else they compare.

Between machines gradients travel as messages, and gloo sends them so inside of one machine, too:
there each exchange wakes several threads, which compete for the cores with what the ranks compute.
But ranks of one machine can read what the others have written, and need to hear from them only
that it is there.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gan_lib.training.ranks import SECONDS_FOR_A_COLLECTIVE, Ranks

# Each rank reads what all others have written, so what it reads grows with their number; what it
# sends in gloo's ring does not.
MOST_RANKS = 8
# A rank that is a little late is waited for without going to sleep: to wake up takes so much longer
# that nothing would be gained over messages.
SECONDS_AWAKE = 0.01
# How long it may take to hand the memory from one rank to another, once all have met.
SECONDS_TO_HAND_OUT = 60
CLOSED = "connection closed by peer: another rank has ended"

# Those of this process.
_ALL: weakref.WeakSet[SharedSum] = weakref.WeakSet()


class SharedSum:
    """Adds up a tensor over the ranks of one machine, again and again; `share_sum` makes it.

    Each rank writes its part where all can read it, and sends each other rank a byte. When it has
    one from each of them, it adds up all parts, in the order of the ranks, so that all get the same
    sum, to the bit. Who waits for a rank that has died hears of it: the system closes what that one
    was connected by.

    Args:
        memory: what the ranks share.
        n: elements of the tensor.
        dtype: of the tensor.
        rank: this rank.
        others: a connection with each other rank.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        n: int,
        dtype: torch.dtype,
        rank: int,
        others: Sequence[socket.socket],
    ) -> None:
        self._rank, self._others = rank, others
        # Two places for each rank. It writes into one while others may still read the other; and
        # into that again when all have sent the byte after, for which they had read it.
        self._places = torch.frombuffer(memory, dtype=dtype).view(2, len(others) + 1, n)
        # Sums that this rank has sent its part of, that all have, and elements of the next one.
        self._sent = self._complete = self._filled = 0
        weakref.finalize(self, _close, others)
        _ALL.add(self)

    def send(self, part: Tensor, last: bool) -> Callable[[], None]:
        """Write the next piece of this rank's tensor, and after the last one, tell the others.

        Args:
            part: its values, one-dimensional, as many on each rank.
            last: whether this completes the tensor.

        Returns:
            What waits for the others, and has the mean over all ranks in `part` then.
        """
        start, self._filled = self._filled, self._filled + part.numel()
        places = self._places[self._sent % 2, :, start : self._filled]
        # The mean, as DDP finds it: divided first, then added up.
        torch.div(part, len(places), out=places[self._rank])
        receive = partial(self._receive, self._sent + 1, places, part)
        if last:
            self._sent, self._filled = self._sent + 1, 0
            for other in self._others:
                other.sendall(b"!")
        return receive

    def _receive(self, sums: int, places: Tensor, part: Tensor) -> None:
        if self._complete < sums:
            for other in self._others:
                _wait_for(other)
            self._complete = sums
        first, second, *more = places
        torch.add(first, second, out=part)
        for place in more:
            part.add_(place)

    def holds(self, values: Tensor) -> bool:
        """Whether there is a place for all of `values`."""
        places = self._places
        alike = values.device == places.device and values.dtype == places.dtype
        return alike and values.numel() <= places.shape[-1]

    def leave(self) -> None:
        """End this rank's part: whoever waits for it raises, and so does this one if it waits."""
        for other in self._others:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)


def leave_all() -> None:
    """Leave all sums that this process takes part in."""
    for shared in list(_ALL):
        shared.leave()


def share_sum(parts: Sequence[Tensor]) -> SharedSum | None:
    """A sum that all ranks share; None if they cannot. All of them call this.

    They can on Linux, on one machine (and in one container), as the same user, with CPUs.

    Args:
        parts: tensors of one type. There is place for as many elements as they have together.

    Raises:
        OSError: if another rank is lost meanwhile.
    """
    ranks = Ranks()
    n, dtype = sum(part.numel() for part in parts), parts[0].dtype
    if not 1 < ranks.world_size <= MOST_RANKS or parts[0].device.type != "cpu":
        return None
    size = 2 * ranks.world_size * n * dtype.itemsize
    with contextlib.ExitStack() as held:
        address, connected = None, False
        # AttributeError: this is no Linux. OSError: there is not so much memory, or none to share.
        with contextlib.suppress(OSError, AttributeError):
            if ranks.rank == 0:
                # It has no name, and nothing is left of it when the last rank has ended.
                memory = held.enter_context(open(os.memfd_create("gradients"), "r+b"))
                # Now: a write where no memory is left would end the process.
                os.posix_fallocate(memory.fileno(), 0, size)
                door = held.enter_context(socket.socket(socket.AF_UNIX))
                # A name in no folder: nobody finds it from another machine or container.
                door.bind(f"\0{secrets.token_hex(16)}")
                door.listen(ranks.world_size)
                address, connected = door.getsockname(), True
        address = ranks.gather(address)[0]
        with contextlib.suppress(OSError, AttributeError):
            if ranks.rank > 0 and address:
                door = held.enter_context(socket.socket(socket.AF_UNIX))
                door.settimeout(SECONDS_TO_HAND_OUT)
                door.connect(address)
                connected = _same_user(door)
        if not all(ranks.gather(connected)):
            return None
        if ranks.rank == 0:
            others = _hand_out(door, memory.fileno(), ranks.world_size)
        else:
            _, fds, *_ = socket.recv_fds(door, 1, ranks.world_size)
            if not fds:
                raise ConnectionError(CLOSED)
            memory = held.enter_context(open(fds[0], "r+b"))
            others = [socket.socket(fileno=fd) for fd in fds[1:]]
        return SharedSum(mmap.mmap(memory.fileno(), size), n, dtype, ranks.rank, others)


def _hand_out(door: socket.socket, memory: int, world_size: int) -> list[socket.socket]:
    """On rank 0: give the other ranks the memory, and each pair of ranks a connection."""
    ends: list[list[socket.socket]] = [[] for _ in range(world_size)]
    for pair in itertools.combinations(ends, 2):
        for end, connection in zip(pair, socket.socketpair(), strict=True):
            end.append(connection)
    door.settimeout(SECONDS_TO_HAND_OUT)
    # It does not matter which rank gets which: each has one with each other one.
    own, *waiting = ends
    while waiting:
        with door.accept()[0] as guest:
            if _same_user(guest):
                theirs = waiting.pop()
                socket.send_fds(guest, [b"!"], [memory, *(end.fileno() for end in theirs)])
                _close(theirs)
    return own


def _same_user(connection: socket.socket) -> bool:
    """Whether this user is at the other end: everybody on a machine may knock at its doors."""
    form = struct.Struct("=3i")  # process, user, group
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size)
    _, user, _ = form.unpack(found)
    return bool(user == os.getuid())


def _close(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def _wait_for(other: socket.socket) -> None:
    """Return when another rank has sent its byte."""
    poll = select.poll()
    poll.register(other, select.POLLIN)
    asleep_from = time.perf_counter() + SECONDS_AWAKE
    while not poll.poll(0):
        if time.perf_counter() > asleep_from:
            if not poll.poll(1000 * SECONDS_FOR_A_COLLECTIVE):
                raise TimeoutError(f"a rank has sent nothing for {SECONDS_FOR_A_COLLECTIVE} s")
            break
        os.sched_yield()  # where there are more ranks than cores
    if not other.recv(1):
        raise ConnectionError(CLOSED)
