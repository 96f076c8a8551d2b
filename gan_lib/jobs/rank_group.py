"""One function as ranks on a Dask cluster, failing together.

Each rank is a Dask task that is pinned to its worker. The ranks meet at a port
of rank 0's machine and then talk among themselves; what they do there is the
function's own affair.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest.mock import patch

import psutil
import torch

# Before any process group, or it keeps the group's port open: see gan_lib.training.ranks.
import torch._dynamo
import torch.distributed as dist
from distributed import Client, Future, Worker, get_worker
from distributed import wait as wait_for_futures
from distributed.comm import get_address_host

from gan_lib.base.errors import ClusterError, WorkerLostError
from gan_lib.cluster.shipping import ship_package
from gan_lib.cluster.workers import RANK_PREFIX, SECONDS_OF_SILENCE, Place, Watch, ask
from gan_lib.training.ranks import ATTEMPT_VARIABLE, LEAVE

# How long the other ranks may take to notice that one has failed, and to end.
SECONDS_TO_FAIL = 10
# How long a value may take that a rank has brought back.
SECONDS_FOR_A_VALUE = 5
# How often a rank asks whether anybody still waits for it.
SECONDS_BETWEEN_LOOKS = 0.5
# How long the ranks may take to meet, and one attempt of it, which nothing can interrupt.
SECONDS_TO_MEET, SECONDS_TO_CONNECT = 300, 3
# A collective that takes longer has lost a rank that Dask still hears of.
SECONDS_FOR_A_COLLECTIVE = 1800


def start_ranks(
    client: Client,
    places: list[Place],
    device: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    attempt: str = "",
) -> dict[str, Future]:
    """Start one rank on each place; worker -> future, by rank.

    Raises:
        WorkerLostError: if a worker does not answer.
        ClusterError: if one has another version of gan_lib.
    """
    gpus, backend = [0] * len(places), "gloo"
    workers = [place.worker for place in places]
    ship_package(client, workers)
    # Also where the answer is not needed: it makes them import torch, before a silence of theirs
    # is taken for a failure.
    seen = ask(client, lambda: client.run(_visible_gpus, workers=workers), workers)
    if device != "cpu":
        gpus, backend = pick_gpus(
            [seen[place.worker] for place in places], [place.local_rank for place in places]
        )
    first = places[0]
    job_id = uuid.uuid4().hex
    at_first = [first.worker]
    ports = ask(client, lambda: client.run(_listen, job_id, first.host, workers=at_first), at_first)
    port = ports[first.worker]
    return {
        place.worker: client.submit(
            _work_as_rank,
            function,
            arguments,
            rank=rank,
            world_size=len(places),
            gpu=gpus[rank],
            backend=backend,
            host=first.host,
            port=port,
            job_id=job_id,
            attempt=attempt,
            # A key of its own: Dask would answer equal work from its cache, and train nothing.
            key=f"{RANK_PREFIX}{rank}-{job_id}",
            pure=False,
            workers=[place.worker],
            allow_other_workers=False,
        )
        for rank, place in enumerate(places)
    }


class RankGroup:
    """Ranks that run together on a cluster, and fail together.

    Args:
        client: of the cluster.
        futures: worker -> future, by rank, as `start_ranks` returns them.
        watch: over the cluster's workers, if somebody keeps one already.

    Attributes:
        workers: addresses of their workers, by rank.
    """

    def __init__(
        self, client: Client, futures: Mapping[str, Future], watch: Watch | None = None
    ) -> None:
        self.workers = list(futures)
        self._client = client
        self._futures = list(futures.values())
        self._error: BaseException | None = None
        # What the ranks that have ended brought back, by rank.
        self._values: dict[int, Any] = {}
        self._watch = watch or Watch(client)
        self._hanging: set[str] = set()

    def done(self) -> bool:
        """Whether all ranks have ended, well or not."""
        return self.error() is not None or len(self._values) == len(self._futures)

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for the end; what each rank returned, by rank.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            The error of the rank that failed first, with that rank's traceback.
            WorkerLostError: if a worker process died, or hangs.
            TimeoutError: if it takes longer than `timeout`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the ranks still run after {timeout} s")
            with contextlib.suppress(TimeoutError):
                wait_for_futures(self._futures, timeout=0.5)
        error = self.error()
        if error is not None:
            raise error
        return [self._values[rank] for rank in range(len(self._futures))]

    def error(self) -> BaseException | None:
        """The error of the rank that failed first; None while none has."""
        if self._error is None and (self._failures() or self._gone()):
            # The other ranks fail a moment later, and may have failed first.
            deadline = time.monotonic() + SECONDS_TO_FAIL
            while self._still_running() and time.monotonic() < deadline:
                time.sleep(0.1)
            self._error = self._cause()
            if self._error is not None:
                # A rank whose task is cancelled ends by itself, see `_leave_when_unwanted`.
                self._client.cancel([f for f in self._futures if not f.done()])
        return self._error

    def _cause(self) -> BaseException | None:
        gone = self._gone()
        if gone:
            silent = [self.workers[rank] for rank in gone if self.workers[rank] in self._hanging]
            if silent:
                return WorkerLostError(
                    f"the worker of rank {gone[0]} ({silent[0]}) has not answered for "
                    f"{SECONDS_OF_SILENCE:.0f} s: it was suspended, or cut off"
                )
            # What the other ranks raised is that this one closed its connections.
            return WorkerLostError(
                f"the worker process of rank {gone[0]} ({self.workers[gone[0]]}) is gone: "
                "it was killed, ran out of memory, or its machine was lost"
            )
        first = min(self._failures(), key=lambda failure: failure.order, default=None)
        # None where a rank that seemed to be gone had ended well in the meantime.
        return first and first.error.with_traceback(first.traceback)

    def _failures(self) -> list[_Failure]:
        for rank, future in enumerate(self._futures):
            # Read once: it may change between two looks.
            status = future.status
            if rank in self._values or status == "pending":
                continue
            if status == "finished":
                # The value lies on a worker, which may hang by now.
                with contextlib.suppress(TimeoutError):
                    self._values[rank] = future.result(timeout=SECONDS_FOR_A_VALUE)
            else:
                # Dask's own failure: the task never ran, or was cancelled.
                error = future.exception() if status == "error" else CancelledError()
                self._values[rank] = _Failure(_LAST, error, error.__traceback__)
        return [value for value in self._values.values() if isinstance(value, _Failure)]

    def _still_running(self) -> bool:
        gone = self._gone()
        self._failures()
        ranks = range(len(self._futures))
        return any(rank not in self._values and rank not in gone for rank in ranks)

    def _gone(self) -> list[int]:
        # A task that is pinned to a worker waits for it for ever, also when it has died.
        alive = self._watch.alive()
        # The end of one that hangs lets the others fail: they wait for what it will never send.
        self._hanging = self._watch.end_hanging(self.workers)
        return [
            rank
            for rank, worker in enumerate(self.workers)
            if rank not in self._values and worker not in alive
        ]


# Listening sockets by job: opened before the ranks start, so that the port is known to be free.
_LISTENERS: dict[str, socket.socket] = {}


def _listen(job_id: str, host: str) -> int:
    """On rank 0's worker: reserve a free port for the ranks to meet at."""
    for left_over in _LISTENERS.values():
        left_over.close()  # its ranks never started
    _LISTENERS.clear()
    listener = socket.create_server((host, 0), family=_family(host), backlog=1024)
    _LISTENERS[job_id] = listener
    return listener.getsockname()[1]


def _work_as_rank(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    gpu: int,
    backend: str,
    host: str,
    port: int,
    job_id: str,
    attempt: str,
) -> Any:
    """On a worker: meet the other ranks, run the function, and part."""
    if dist.is_initialized():
        raise ClusterError(
            "this worker is already a rank of another job: wait for that one, "
            "or start the workers with one thread each"
        )
    told = {"LOCAL_RANK": str(gpu), ATTEMPT_VARIABLE: attempt, **_dask_network()}
    LEAVE.clear()
    ended = threading.Event()
    watcher = threading.Thread(
        target=_leave_when_unwanted,
        args=(get_worker(), get_worker().get_current_task(), ended, _connections()),
        daemon=True,
    )
    watcher.start()
    store = None
    try:
        with patch.dict(os.environ, told):
            store = _meet(host, port, world_size, rank, _LISTENERS.pop(job_id, None))
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=SECONDS_FOR_A_COLLECTIVE),
            )
            return function(**arguments)
    except Exception as error:
        # While this rank holds its connections, no other rank has noticed: so the order in
        # which they count themselves here is the order in which they failed.
        order = _LAST
        if store is not None:
            with contextlib.suppress(Exception):
                order = store.add("failures", 1)
        error.add_note(f"raised by rank {rank} of {world_size} on {get_worker().address}")
        return _Failure(order, *_portable(error))
    finally:
        ended.set()
        watcher.join()
        LEAVE.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(
    host: str, port: int, world_size: int, rank: int, listener: socket.socket | None
) -> dist.TCPStore:
    """The store through which the ranks find each other; it is served by rank 0.

    Raises:
        ConnectionError: if rank 0 is gone: it has listened before any rank was started.
        DistError, TimeoutError: if it cannot be reached for `SECONDS_TO_MEET`, or nobody waits
            any more for this rank (see `_leave_when_unwanted`, which ends also the silence of
            one that has accepted a connection).
    """
    deadline = time.monotonic() + SECONDS_TO_MEET
    while True:
        try:
            if rank != 0:
                socket.create_connection((host, port), SECONDS_TO_CONNECT).close()
            store = dist.TCPStore(
                host,
                port,
                world_size,
                is_master=rank == 0,
                timeout=datetime.timedelta(seconds=SECONDS_TO_CONNECT),
                wait_for_workers=False,
                master_listen_fd=listener.detach() if listener is not None else None,
            )
        except (dist.DistError, TimeoutError):
            if rank == 0 or LEAVE.is_set() or time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(datetime.timedelta(seconds=SECONDS_TO_MEET))
            return store


def _leave_when_unwanted(
    worker: Worker, key: Any, ended: threading.Event, before: set[tuple[Any, Any]]
) -> None:
    """In a thread beside a rank: have it end when its task is cancelled.

    Dask cannot stop a function that runs. It cancels the task when its client ends or is lost,
    and a job does when one of its ranks is lost.

    Args:
        worker: that the rank runs on.
        key: of its task.
        ended: set when the rank has ended.
        before: this process's connections before the rank met the others.
    """
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled":
            LEAVE.set()
            break
    if ended.wait(SECONDS_TO_FAIL):
        return
    # It waits for another rank that will never answer.
    with contextlib.suppress(Exception):
        dist.group.WORLD.abort()
    for connection in psutil.Process().net_connections("tcp"):
        if (connection.laddr, connection.raddr) not in before and connection.raddr:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as sock:
                sock.shutdown(socket.SHUT_RDWR)


def _connections() -> set[tuple[Any, Any]]:
    return {(c.laddr, c.raddr) for c in psutil.Process().net_connections("tcp")}


# The order of a failure that could not be counted: the meeting place was already gone.
_LAST = 1_000_000


@dataclass(frozen=True)
class _Failure:
    """What a rank brings back that raised.

    It is returned and not raised: Dask would log every rank's error as it comes,
    the consequences before the cause.
    """

    order: int
    error: BaseException
    traceback: TracebackType | None


def _portable(error: Exception) -> tuple[Exception, TracebackType | None]:
    """The error and its traceback, or its text if it cannot travel."""
    try:
        # distributed has taught pickle to carry tracebacks.
        return pickle.loads(pickle.dumps((error, error.__traceback__)))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error))), None


def _dask_network() -> dict[str, str]:
    """Variables that have gloo and NCCL use the network interface of Dask, unless told otherwise.

    Their own choice follows the machine's host name, which on a laptop may be a
    network that others can reach and on a cluster one that leads nowhere.
    """
    host = get_address_host(get_worker().address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return {
                variable: os.environ.get(variable, name)
                for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
            }
    return {}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _visible_gpus() -> list[str]:
    """On a worker: identities of the GPUs that it sees."""
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def pick_gpus(seen: Sequence[Sequence[str]], local_ranks: Sequence[int]) -> tuple[list[int], str]:
    """Which of the GPUs that it sees each rank takes, and the backend that fits.

    Args:
        seen: identities of the GPUs that each rank sees, by rank.
        local_ranks: numbers of the ranks on their machines, by rank.

    Returns:
        Indices into `seen`, by rank; and "nccl" if every rank has a GPU to itself,
        otherwise "gloo", because NCCL refuses two ranks on one GPU.
    """
    if not all(seen):
        return [0] * len(seen), "gloo"
    # Workers that were given a GPU each see it first (`start_cluster`, dask-cuda); workers
    # that nobody has told apart all see the same list.
    own_first = [0] * len(seen)
    by_local_rank = [n % len(gpus) for gpus, n in zip(seen, local_ranks, strict=True)]
    for indices in (own_first, by_local_rank):
        if len({gpus[i] for gpus, i in zip(seen, indices, strict=True)}) == len(seen):
            return indices, "nccl"
    return by_local_rank, "gloo"
