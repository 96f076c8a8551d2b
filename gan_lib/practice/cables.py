"""A long cable: what goes in at one end comes out at the other some milliseconds later.

Linux has a delay of its own (netem), which not every kernel is built with. Here both ends of a
cable are network devices whose frames a process reads and writes (TAP):

    python -m gan_lib.practice.cables END END SECONDS
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

# Of <linux/if_tun.h>.
SET_NAME, SET_OFFLOAD = 0x400454CA, 0x400454D0
TAP, NO_PACKET_INFO, WITH_HEADER = 0x0002, 0x1000, 0x4000
CHECKSUM, SEGMENTS_4, SEGMENTS_6 = 0x01, 0x02, 0x04
# More than any frame: 64 KB of an IP packet, and what stands before it.
LARGEST = 2**16 + 64


def lay(near: str, far: str, seconds: float) -> subprocess.Popen[bytes]:
    """Make two network devices, joined by a cable that takes so long in each direction.

    The process that is returned carries the frames. It ends when its standard input is closed,
    and with it the devices.

    Raises:
        OSError: if this machine cannot have them.
    """
    ends = [_end(near), _end(far)]
    # A process of its own: nothing else that its starter does makes the cable longer.
    command = [sys.executable, "-m", __name__, *map(str, ends), str(seconds)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=ends, start_new_session=True
        )
    finally:
        for end in ends:
            os.close(end)


def _end(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    told = struct.pack("16sH22x", name.encode(), TAP | NO_PACKET_INFO | WITH_HEADER)
    fcntl.ioctl(end, SET_NAME, told)
    # TCP leaves it to the device to add up checksums and to cut up to 64 KB into frames. A header
    # tells what is left to do; handed on with its frame, nobody has to do it.
    fcntl.ioctl(end, SET_OFFLOAD, CHECKSUM | SEGMENTS_4 | SEGMENTS_6)
    return end


def carry(ends: tuple[int, int], seconds: float) -> None:
    """Each frame that comes out of one end goes into the other so much later."""
    other = dict(zip(ends, reversed(ends), strict=True))
    stop = sys.stdin.fileno()
    # One queue for both directions, since all wait equally long.
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        left = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        # Not `poll`, which counts whole milliseconds.
        ready = select.select([stop, *ends], [], [], left)[0]
        if stop in ready:
            return
        for end in ready:
            frame = os.read(end, LARGEST)
            on_the_way.append((time.monotonic() + seconds, other[end], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, frame = on_the_way.popleft()
            # What a device that is down does not take is lost, as in a cable that was pulled.
            with contextlib.suppress(OSError):
                os.write(end, frame)


if __name__ == "__main__":
    carry((int(sys.argv[1]), int(sys.argv[2])), float(sys.argv[3]))
