"""What a worker does as a rank: meet the others, run the function, and part.

Nobody can stop a function that runs: so a thread beside it looks whether anybody still waits
for it, and frees it from collectives that will never end.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import math
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist
from distributed import Worker, get_worker
from distributed.comm.addressing import get_address_host
from distributed.core import Status
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # exported, untold

from gan_lib.base.errors import ClusterError
from gan_lib.training.ranks import ATTEMPT_VARIABLE, LEAVE, RETIRE, SECONDS_FOR_A_COLLECTIVE
from gan_lib.training.shared import leave_all

# How long the other ranks may take to notice that one has failed, and to end.
SECONDS_TO_FAIL = 10
# How long they may take to leave together when the worker of one is to end: Dask waits so long
# for what a worker does that it closes.
SECONDS_TO_RETIRE = 30
# How often a rank asks whether anybody still waits for it.
SECONDS_BETWEEN_LOOKS = 0.5
# How long the ranks may take to meet, and one attempt of it, which nothing can interrupt.
SECONDS_TO_MEET, SECONDS_TO_CONNECT = 300, 3


@dataclass(frozen=True)
class RankTask:
    """Which rank a worker is, and where it meets the others."""

    rank: int
    world_size: int
    gpu: int  # index of its own among those that the worker sees
    backend: str
    # Where rank 0 listens.
    host: str
    port: int
    attempt: str = ""  # of a supervised job


@dataclass(frozen=True)
class Failure:
    """What a rank brings back that raised.

    It is returned and not raised: Dask would log every rank's error as it comes,
    the consequences before the cause.
    """

    error: BaseException
    traceback: TracebackType | None
    # Where it could not be counted, because the meeting place was already gone, it is the last.
    order: float = math.inf


# Listening sockets by port: opened before the ranks start, so that the port is known to be free.
_LISTENERS: dict[int, socket.socket] = {}


def listen(host: str) -> int:
    """On rank 0's worker: reserve a free port for the ranks to meet at."""
    for left_over in _LISTENERS.values():
        left_over.close()  # its ranks never started
    _LISTENERS.clear()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=1024)
    port: int = listener.getsockname()[1]
    _LISTENERS[port] = listener
    return port


def visible_gpus() -> list[str]:
    """On a worker: identities of the GPUs that it sees."""
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def get_ready(function: Callable[..., Any]) -> list[str]:
    """On a worker that is to be a rank: import what it needs; the GPUs that it sees.

    That `function` has arrived here means that its modules have been imported.
    """
    return visible_gpus()


def work_as_rank(function: Callable[..., Any], arguments: dict[str, Any], task: RankTask) -> Any:
    """On a worker: call the function among the other ranks; what it returns, or a `Failure`.

    Raises:
        ClusterError: if this worker is a rank already.
    """
    if dist.is_initialized():
        raise ClusterError(
            "this worker is already a rank of another job: wait for that one, "
            "or start the workers with one thread each"
        )
    worker = get_worker()
    told = {"LOCAL_RANK": str(task.gpu), ATTEMPT_VARIABLE: task.attempt, **dask_network(worker)}
    store, met = None, threading.Event()
    with (
        _retiring_on_sigterm(worker),
        _leaving_when_unwanted(worker, met),
        patch.dict(os.environ, told),
    ):
        try:
            store = meet(task)
            _count_groups_anew()
            device = None
            if task.backend == "nccl":
                # Told of it, NCCL connects here and not in the first exchange; and the current
                # device is where objects are gathered, whatever the function does.
                device = torch.device("cuda", task.gpu)
                torch.cuda.set_device(device)
            dist.init_process_group(
                task.backend,
                store=store,
                rank=task.rank,
                world_size=task.world_size,
                timeout=datetime.timedelta(seconds=SECONDS_FOR_A_COLLECTIVE),
                device_id=device,
            )
            met.set()
            return function(**arguments)
        except Exception as error:
            # While this rank holds its connections, no other rank has noticed: so the order in
            # which they count themselves here is the order in which they failed.
            order = math.inf
            if store is not None:
                with contextlib.suppress(Exception):
                    order = store.add("failures", 1)
            error.add_note(f"raised by rank {task.rank} of {task.world_size} on {worker.address}")
            return Failure(*_portable(error), order)


def meet(task: RankTask) -> TCPStore:
    """The store through which the ranks find each other; it is served by rank 0.

    Returns when all of them have come to it: what follows, in which each rank connects with each
    other one, waits much longer for one that does not come.

    Raises:
        ConnectionError: if rank 0 is gone: it has listened before any rank was started.
        DistError, TimeoutError: if it cannot be reached for `SECONDS_TO_MEET`, another rank has
            not come in that time, or nobody waits any more for this one (see
            `_leaving_when_unwanted`, which ends also the silence of one that has accepted a
            connection).
    """
    is_first = task.rank == 0
    listener = _LISTENERS.pop(task.port, None) if is_first else None
    deadline = time.monotonic() + SECONDS_TO_MEET
    while True:
        try:
            if not is_first:
                socket.create_connection((task.host, task.port), SECONDS_TO_CONNECT).close()
            store = TCPStore(
                task.host,
                task.port,
                task.world_size,
                is_master=is_first,
                timeout=datetime.timedelta(seconds=SECONDS_TO_CONNECT),
                wait_for_workers=False,
                master_listen_fd=listener.detach() if listener is not None else None,
            )
        except (dist.DistError, TimeoutError):
            if is_first or LEAVE.is_set() or time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(datetime.timedelta(seconds=SECONDS_TO_MEET))
            await_all(store, task.world_size)
            return store


def await_all(store: TCPStore, world_size: int) -> None:
    """Return when all ranks have come to the store. The doctor sees who waits here."""
    if store.add("here", 1) == world_size:
        store.set("all are here", "")
    store.wait(["all are here"])


def _count_groups_anew() -> None:
    """Have the group of ranks that is made next in this process be its first.

    torch names a group by how many this process has made before, and ranks that know theirs by
    different names look for each other for ever. It starts again from 0 when a group ends; one that
    could not be made, because another rank was lost meanwhile, counts and never ends.
    """
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


@contextlib.contextmanager
def _leaving_when_unwanted(worker: Worker, met: threading.Event) -> Iterator[None]:
    """Inside, a rank is made to end when its task is cancelled, or its worker is to end.

    `met` says that it has been connected with the others.

    Dask cancels the task when its client ends or is lost, and a job does when one of its ranks
    is lost. A worker is to end when its lifetime is over, or somebody retires or closes it. The
    rank parts from the others after it.
    """
    before = {(c.laddr, c.raddr) for c in _connections()}
    key = worker.get_current_task()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            task = worker.state.tasks.get(key)
            if worker.status not in (Status.running, Status.paused):
                RETIRE.set()
                break
            if task is None or task.state == "cancelled":
                LEAVE.set()
                break
        if ended.wait(SECONDS_TO_RETIRE if RETIRE.is_set() else SECONDS_TO_FAIL):
            return
        # It waits for another rank that will never answer.
        with contextlib.suppress(RuntimeError):  # it has just begun to share another sum
            leave_all()
        with contextlib.suppress(Exception):
            if dist.group.WORLD is not None:
                dist.group.WORLD.abort()
        for c in _connections():
            if (c.laddr, c.raddr) not in before and c.raddr:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(c.fd)) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
        if not ended.wait(SECONDS_TO_FAIL) and not met.is_set() and worker.nanny is not None:
            # gloo waits for ever for a rank that has died while they connected, and hears of
            # nothing: Dask would take this worker for a free one. Its nanny starts it anew;
            # without one this may be somebody's notebook.
            os.kill(os.getpid(), signal.SIGKILL)

    LEAVE.clear()
    RETIRE.clear()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        LEAVE.clear()
        RETIRE.clear()
        leave_all()
        if dist.is_initialized():
            dist.destroy_process_group()
        if torch.cuda.is_initialized():
            # The worker goes on, and somebody else may want this memory. After an error of CUDA,
            # whatever one asks it fails with the same.
            gc.collect()
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _retiring_on_sigterm(worker: Worker) -> Iterator[None]:
    """Inside, SIGTERM has the worker retire, where it would end the process at once.

    A batch system sends it to every process of a job, to the worker as to its nanny, which
    starts it again unless it is to end itself.
    """
    loop = worker.loop.asyncio_loop  # type: ignore[attr-defined]  # tornado's, over asyncio's

    def retire(*_: Any) -> None:
        close = worker.close_gracefully(restart=worker.nanny is not None, reason="SIGTERM")
        loop.call_soon_threadsafe(asyncio.ensure_future, close)

    async def handle(handler: Any) -> Any:
        # Only the main thread may, and there are workers in other ones.
        if threading.current_thread() is not threading.main_thread():
            return None
        return signal.signal(signal.SIGTERM, handler)

    before = asyncio.run_coroutine_threadsafe(handle(retire), loop).result()
    try:
        yield
    finally:
        # A worker that closes has no loop any more, or soon.
        with contextlib.suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(handle(before), loop).result(SECONDS_BETWEEN_LOOKS)


def _connections() -> list[Any]:
    return psutil.Process().net_connections("tcp")


def _portable(error: Exception) -> tuple[Exception, TracebackType | None]:
    """The error and its traceback, or its text if it cannot travel."""
    try:
        # distributed has taught pickle to carry tracebacks.
        found: tuple[Exception, TracebackType | None]
        found = pickle.loads(pickle.dumps((error, error.__traceback__)))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error))), None
    return found


def dask_network(worker: Worker) -> dict[str, str]:
    """Variables that have gloo and NCCL use the network interface of Dask, unless told otherwise.

    Their own choice follows the machine's host name, which on a laptop may be a
    network that others can reach and on a cluster one that leads nowhere.
    """
    host = get_address_host(worker.address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return {
                variable: os.environ.get(variable, name)
                for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
            }
    return {}
