"""How the ranks of one machine add up their gradients, and who hears of it when one is lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed import Client

from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.training import shared
from gan_lib.training.rank import train_gan
from gan_lib.training.shared import SECONDS_AWAKE, leave_all, share_sum

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory on Linux alone")
N = 1000


def start(function: Callable[..., None], world_size: int, folder: Path) -> list[Any]:
    """Processes that are the ranks of a group; they are killed if they do not end."""
    context = mp.get_context("spawn")
    told = [(rank, world_size, str(folder)) for rank in range(world_size)]
    processes = [context.Process(target=function, args=each) for each in told]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    return [process.exitcode for process in processes]


def meet(rank: int, world_size: int, folder: str) -> shared.SharedSum:
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world_size)
    found = share_sum([torch.empty(N, dtype=torch.float64)])
    assert found is not None
    return found


def values(turn: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return torch.randn(N, generator=generator, dtype=torch.float64)


def add_up(rank: int, world_size: int, folder: str) -> None:
    joint = meet(rank, world_size, folder)
    pauses = random.Random(rank)
    for turn in range(40):
        mine = values(turn, rank)
        pieces = mine.split((300, 700))
        # Where a rank is late, and where it sleeps meanwhile.
        time.sleep(pauses.choice((0, 0, SECONDS_AWAKE / 3, 3 * SECONDS_AWAKE)))
        receive = [joint.send(piece, piece is pieces[-1]) for piece in pieces]
        time.sleep(pauses.choice((0, 0, SECONDS_AWAKE / 3, 3 * SECONDS_AWAKE)))
        for one in receive:
            one()
        # The order of adding up is that of the ranks, on each of them.
        assert torch.equal(mine, sum(values(turn, r) / world_size for r in range(world_size)))


def test_all_ranks_get_the_same_mean_however_late_they_are(tmp_path: Path) -> None:
    assert start(add_up, 3, tmp_path) == [0, 0, 0]


def die(rank: int, world_size: int, folder: str) -> None:
    joint = meet(rank, world_size, folder)
    if rank == 1:
        time.sleep(3 * SECONDS_AWAKE)  # the other one sleeps by then
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ConnectionError):
        joint.send(values(0, rank), last=True)()
    with pytest.raises(OSError):
        joint.send(values(1, rank), last=True)()


def test_the_end_of_a_rank_is_heard_of_by_one_that_waits(tmp_path: Path) -> None:
    assert start(die, 2, tmp_path) == [0, -signal.SIGKILL]


def leave_while_waiting() -> None:
    joint = share_sum([torch.empty(N, dtype=torch.float64)])
    assert joint is not None
    if dist.get_rank() == 0:
        threading.Timer(3 * SECONDS_AWAKE, leave_all).start()
        with pytest.raises(ConnectionError):
            joint.send(values(0, 0), last=True)()
    dist.barrier()
    with pytest.raises(OSError):
        joint.send(values(0, 1), last=True)()


def test_a_rank_that_waits_for_ever_is_freed_from_another_thread(client: Client) -> None:
    run_ranks(client, leave_while_waiting, device="cpu")


def train(parameters: TrainingParameters, most_ranks: int) -> tuple[bool, str]:
    with patch.object(shared, "MOST_RANKS", most_ranks):
        return share_sum([torch.empty(N)]) is not None, train_gan(parameters).weights_sha256


def test_what_is_learnt_is_the_same_as_by_messages(
    client: Client, tiny: TrainingParameters
) -> None:
    told = {"device": "cpu", "parameters": tiny.replace(epochs=2)}
    (by_memory, weights), _ = run_ranks(client, train, **told, most_ranks=shared.MOST_RANKS)
    (by_messages, same), _ = run_ranks(client, train, **told, most_ranks=0)
    assert (by_memory, by_messages) == (True, False)
    assert weights == same


def left_over(parameters: TrainingParameters) -> list[str]:
    """What a training leaves open, or in memory."""

    def held() -> set[str]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        found = {line for line in maps if "memfd:gradients" in line}
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/self/fd/{fd}"))
        return {thing for thing in found if "memfd:" in thing or "socket:" in thing}

    train_gan(parameters)  # gloo connects when it first sends something
    before = held()
    train_gan(parameters)
    return sorted(held() - before)


def test_nothing_is_left_of_it(client: Client, tiny: TrainingParameters) -> None:
    short = tiny.replace(epochs=1)
    assert run_ranks(client, left_over, device="cpu", parameters=short) == [[], []]


def no_memory() -> Any:
    full = OSError(errno.ENOSPC, "No space left on device")
    return patch.object(os, "posix_fallocate", side_effect=full)


def another_user() -> Any:
    return patch.object(shared, "_same_user", return_value=False)


def train_without(refused: Callable[[], Any], rank: int, parameters: TrainingParameters) -> bool:
    told = refused() if dist.get_rank() == rank else contextlib.nullcontext()
    with told:
        train_gan(parameters)
        return share_sum([torch.empty(N)]) is None


@pytest.mark.parametrize(("refused", "rank"), [(no_memory, 0), (another_user, 1)])
def test_ranks_that_can_share_nothing_send_messages(
    client: Client, tiny: TrainingParameters, refused: Callable[[], Any], rank: int
) -> None:
    told = {"refused": refused, "rank": rank, "parameters": tiny.replace(epochs=1)}
    assert run_ranks(client, train_without, device="cpu", **told) == [True, True]


STRANGER = """
import os, socket, sys

os.setuid(65534)
with socket.socket(socket.AF_UNIX) as door:
    door.connect(sys.stdin.buffer.read())
    print("in", flush=True)
    print(socket.recv_fds(door, 1, 8)[:2])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nothing() -> None:
    with socket.socket(socket.AF_UNIX) as door, socket.socket(socket.AF_UNIX) as ours:
        door.bind("")  # a name of the system's choice
        door.listen()
        command = [sys.executable, "-c", STRANGER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            assert stranger.stdin and stranger.stdout
            stranger.stdin.write(door.getsockname())
            stranger.stdin.close()
            assert stranger.stdout.readline() == b"in\n"
            ours.connect(door.getsockname())
            memory = os.memfd_create("gradients")
            (own,) = shared._hand_out(door, memory, 2)
            _, (fd, theirs), *_ = socket.recv_fds(ours, 1, 8)
            assert stranger.stdout.read() == b"(b'', [])\n"
        assert os.fstat(fd).st_ino == os.fstat(memory).st_ino
        with own, socket.socket(fileno=theirs) as end:
            own.sendall(b"!")
            assert end.recv(2) == b"!"
        os.close(memory)
        os.close(fd)
