"""The workers of a Dask cluster: which there are, which answer, which are free for a rank.

Also imported on the scheduler, so it needs nothing but Dask.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed import Client, LocalCluster, Scheduler
from distributed.comm.addressing import get_address_host
from distributed.core import Status

from gan_lib.base.errors import ClusterError, TooFewWorkersError, WorkerLostError
from gan_lib.base.interrupts import interruptible

_T = TypeVar("_T")

SECONDS_TO_WAIT_FOR_WORKERS = 10
# A worker reports every half second; one that says nothing for so long hangs, or is cut off. Where
# ten processes share a core it has been silent for ten seconds, and trained on.
SECONDS_OF_SILENCE = 30.0
# What any question to the cluster may take, and how long a worker may be silent over it: the
# first one has it import torch, from a cold disk, and it reports nothing meanwhile.
SECONDS_TO_ANSWER, SECONDS_TO_THINK = 180.0, 120.0
# The keys of the tasks that are ranks begin with it.
RANK_PREFIX = "rank-"
# Where the scheduler keeps whose each worker is: worker -> client, and a name of its claim.
CLAIMS = "gan_lib-claims"


class OwnCluster(LocalCluster):
    """A cluster that `start_cluster` made: others belong to whoever made them, and may shrink
    and grow by rules of their own."""


@dataclass(frozen=True)
class Place:
    """Where a rank goes: a worker, its machine, and its number on that machine."""

    worker: str
    host: str
    local_rank: int


def _claims(scheduler: Scheduler, owner: str) -> dict[str, tuple[str, str]]:
    """On the scheduler: claims of others than `owner`, whose clients have not gone."""
    claims: dict[str, tuple[str, str]] = scheduler.extensions.get(CLAIMS, {})
    return {
        worker: (client, name)
        for worker, (client, name) in claims.items()
        if name != owner and client in scheduler.clients
    }


def _signs(dask_scheduler: Scheduler, owner: str) -> dict[str, tuple[float, bool]]:
    """On the scheduler: worker -> when it last reported, and whether it can be no new rank."""
    claimed = _claims(dask_scheduler, owner)
    return {
        address: (
            worker.last_seen,
            # One that is paused or asked to leave begins nothing new.
            worker.status != Status.running
            or address in claimed
            or any(str(task.key).startswith(RANK_PREFIX) for task in worker.processing),
        )
        for address, worker in dask_scheduler.workers.items()
    }


def _claim(dask_scheduler: Scheduler, workers: Sequence[str], client: str, owner: str) -> bool:
    """On the scheduler, which does one thing at a time: make these workers the owner's, and no
    others; nothing is changed, and False the answer, if one of them is another's."""
    claims = _claims(dask_scheduler, owner)
    if claims.keys() & set(workers):
        return False
    dask_scheduler.extensions[CLAIMS] = claims | dict.fromkeys(workers, (client, owner))
    return True


class Watch:
    """Looks after the workers of a cluster, for as long as somebody asks, and claims some.

    After `patience` seconds of silence (`SECONDS_OF_SILENCE`) a worker counts no more as alive.
    """

    def __init__(self, client: Client, patience: float | None = None) -> None:
        self.client = client
        self._patience = patience or SECONDS_OF_SILENCE
        self._owner = uuid.uuid4().hex
        self._ended: set[str] = set()
        # By worker: when it was last seen, by the scheduler's clock, and since when that has not
        # changed, by ours, which stands still while a laptop sleeps.
        self._seen: dict[str, tuple[float, float]] = {}

    def alive(self) -> dict[str, bool]:
        """The workers that report -> whether each is a rank, claimed by another watch, or ending.

        Raises:
            WorkerLostError: if the scheduler does not answer.
        """
        told = {"owner": self._owner}
        signs = ask(self.client, lambda: self.client.run_on_scheduler(_signs, **told))
        now = time.monotonic()
        old = self._seen
        self._seen = {
            worker: old[worker]
            if worker in old and old[worker][0] == last_seen
            else (last_seen, now)
            for worker, (last_seen, _) in signs.items()
        }
        return {worker: busy for worker, (_, busy) in signs.items() if not self._silent(worker)}

    def claim(self, workers: Sequence[str]) -> bool:
        """Take these workers, and no others from now on, for one's own: whoever looks for some
        on this cluster finds them busy, until they are released, or this client is gone.

        Returns:
            Whether that was done; it is not if somebody else has one of them.

        Raises:
            WorkerLostError: if the scheduler does not answer.
        """
        # An interrupt waits: whoever gets it then knows what is to be released.
        with interruptible(threading.Event()):
            return bool(ask(self.client, lambda: self._claim(workers)))

    def release(self) -> None:
        """Leave what was claimed to others; a client that can no longer say so has done it."""
        with contextlib.suppress(Exception):
            in_thread(lambda: self._claim([])).result(SECONDS_OF_SILENCE)

    def _claim(self, workers: Sequence[str]) -> Any:
        told = {"workers": workers, "client": self.client.id, "owner": self._owner}
        return self.client.run_on_scheduler(_claim, **told)

    def end_hanging(self, workers: Iterable[str]) -> set[str]:
        """End those of these workers that were silent for too long at the last look.

        Their nannies, where there are any, start them anew.

        Returns:
            The workers that this has been done to, now or before: it is done once.
        """
        hanging = [w for w in workers if w not in self._ended and self._silent(w)]
        if hanging:
            self._ended.update(hanging)
            # Whatever cannot be restarted is left out from now on.
            with contextlib.suppress(Exception):
                restart = self.client.restart_workers
                ask(self.client, lambda: restart(hanging, timeout=20, raise_for_error=False))
        return self._ended

    def _silent(self, worker: str) -> bool:
        """Whether it is there, and has said nothing for too long."""
        now = time.monotonic()
        return now - self._seen.get(worker, (0.0, now))[1] > self._patience


def was_asked_to_leave(client: Client, worker: str) -> bool:
    """Whether a worker that is gone was retired or ended in good order, and was not just lost."""
    asked = False
    for _, told in ask(client, lambda: client.get_events(worker)):
        # An address may have been another worker's before.
        if told.get("action") == "add-worker":
            asked = False
        asked = asked or told.get("action") == "closing-worker" or told.get("expected", False)
    return asked


def wait_a_moment(futures: Sequence[Any], seconds: float) -> None:
    """Return when the first of the Dask futures has ended that had not, or after some time.

    It asks that future's own client. distributed's `wait` asks the last one that was made, which
    fails if this process has a second cluster.
    """
    going_on = next((future for future in futures if not future.done()), None)
    if going_on is not None:
        with contextlib.suppress(TimeoutError):
            going_on.exception(timeout=seconds)


def in_thread(function: Callable[[], _T]) -> Future[_T]:
    """Call a function that may never return, in a thread that then is forgotten."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="asking the cluster").start()
    return result


def ask(client: Client, question: Callable[[], _T], workers: Sequence[str] = ()) -> _T:
    """What a cluster answers; Dask waits for ever for a worker that was suspended.

    `workers` are those that have to answer.

    Raises:
        WorkerLostError: if it does not answer within `SECONDS_TO_ANSWER`, or one of the
            workers is lost or silent meanwhile.
        ClusterError: if the client is closed.
    """
    if client.status not in ("running", "connecting"):
        raise ClusterError("the client is closed: make another by start_cluster() or connect(...)")
    answer = in_thread(question)
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    watch = Watch(client, SECONDS_TO_THINK)
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            answer.exception(timeout=0.5)
        if answer.done():
            return answer.result()
        if workers:
            alive = watch.alive()
            for worker in workers:
                if worker not in alive:
                    raise WorkerLostError(f"the worker {worker} is gone, or does not answer")
    raise WorkerLostError(
        f"the cluster does not answer for {SECONDS_TO_ANSWER:.0f} s: a worker hangs, or is cut off"
    )


def replace_lost_workers(client: Client) -> None:
    """Have a cluster that `start_cluster` made start again what it has lost for good."""
    cluster = client.cluster
    if isinstance(cluster, OwnCluster) and set(cluster.worker_spec) - set(cluster.workers):
        # The same number as before: Dask then starts those that are missing.
        with contextlib.suppress(Exception):
            cluster.scale(len(cluster.worker_spec))


def require_some_workers(n_workers: int | None) -> None:
    """Raise ClusterError unless a number of workers is 1 or more, or None, which means all."""
    if n_workers is not None and n_workers < 1:
        raise ClusterError(f"n_workers is {n_workers}: give at least 1, or None for all there are")


def wait_for_workers(client: Client, wanted: int) -> None:
    """Wait for the workers of a cluster that are starting.

    Raises:
        TooFewWorkersError: if there are fewer than `wanted`.
    """
    deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_WORKERS
    # `scheduler_info` may be a cache without workers; this asks.
    while (there := len(ask(client, client.nthreads))) < wanted:
        if time.monotonic() > deadline:
            assert client.scheduler is not None  # it has just answered
            how = f"`dask worker {client.scheduler.address}`"
            if client.cluster is not None:
                waiting = f"cluster.get_client().wait_for_workers({wanted})"
                how = f"`cluster.scale({wanted})`, then `{waiting}`"
            raise TooFewWorkersError(
                f"the cluster has {there or 'no'} workers and {wanted} are needed: start more "
                f"({how})" + (", or ask for fewer" if there else "")
            )
        time.sleep(0.1)


def find_places(
    client: Client, wanted: int, most: int | None, watch: Watch | None = None
) -> list[Place]:
    """Where the ranks of a new job go: at least `wanted`, at most `most`.

    Where `most` is None it takes all workers that no other job uses. They are claimed with
    `watch`, if there is one: of two jobs that choose at the same time, each gets its own.

    Raises:
        TooFewWorkersError: if there are too few.
    """
    wait_for_workers(client, wanted)
    looking = watch or Watch(client)
    while True:
        alive = looking.alive()
        free = [worker for worker, busy in alive.items() if not busy]
        if len(free) < wanted:
            raise TooFewWorkersError(
                f"the cluster has {len(alive)} workers, {len(alive) - len(free)} of which train "
                f"for another job, and {wanted} are needed: wait for that one, stop it, start more "
                "workers, or ask for fewer"
            )
        places = assign_places(free, most)
        if watch is None or watch.claim([place.worker for place in places]):
            return places


def assign_places(workers: Iterable[str], n_workers: int | None) -> list[Place]:
    """Places on these workers, by rank: those of one machine next to each other."""
    places: list[Place] = []
    on_host: dict[str, int] = {}
    for address in sorted(workers, key=lambda a: (get_address_host(a), a))[: n_workers or None]:
        host = get_address_host(address)
        places.append(Place(address, host, local_rank=on_host.get(host, 0)))
        on_host[host] = on_host.get(host, 0) + 1
    return places
