"""One function as ranks on a Dask cluster, failing together.

Each rank is a Dask task that is pinned to its worker. The ranks meet at a port
of rank 0's machine and then talk among themselves; what they do there is the
function's own affair.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from distributed import Client, Future

from gan_lib.base.errors import WorkerLostError, WorkerRetiredError
from gan_lib.cluster.shipping import ship_package
from gan_lib.cluster.workers import (
    RANK_PREFIX,
    SECONDS_OF_SILENCE,
    Place,
    Watch,
    ask,
    wait_a_moment,
    was_asked_to_leave,
)
from gan_lib.jobs.rank_task import (
    SECONDS_TO_FAIL,
    SECONDS_TO_RETIRE,
    Failure,
    RankTask,
    get_ready,
    listen,
    work_as_rank,
)

# How long a value may take that a rank has brought back, at first; then twice as long each time.
SECONDS_FOR_A_VALUE = 5


def start_ranks(
    client: Client,
    places: list[Place],
    device: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    attempt: str = "",
) -> dict[str, Future[Any]]:
    """Start one rank on each place; worker -> future, by rank.

    Raises:
        WorkerLostError: if a worker does not answer.
        ClusterError: if one has another version of gan_lib.
    """
    workers = [place.worker for place in places]
    ship_package(client, workers)
    # Before a silence of theirs is taken for a failure: importing torch may take a while.
    seen = ask(client, lambda: client.run(get_ready, function, workers=workers), workers)
    gpus, backend = [0] * len(places), "gloo"
    if device != "cpu":
        gpus, backend = pick_gpus([seen[w] for w in workers], [p.local_rank for p in places])
    first, host = workers[:1], places[0].host
    (port,) = ask(client, lambda: client.run(listen, host, workers=first), first).values()
    name = uuid.uuid4().hex
    return {
        worker: client.submit(
            work_as_rank,
            function,
            arguments,
            RankTask(rank, len(workers), gpus[rank], backend, host, port, attempt),
            # A key of its own: Dask would answer equal work from its cache, and train nothing.
            key=f"{RANK_PREFIX}{rank}-{name}",
            pure=False,
            workers=[worker],
            allow_other_workers=False,
        )
        for rank, worker in enumerate(workers)
    }


class RankGroup:
    """Ranks that run together on a cluster, and fail together, as `start_ranks` started them."""

    def __init__(
        self, client: Client, futures: Mapping[str, Future[Any]], watch: Watch | None = None
    ) -> None:
        self._workers = list(futures)
        self._client = client
        self._futures = list(futures.values())
        self._error: BaseException | None = None
        # What the ranks that have ended brought back, by rank.
        self._values: dict[int, Any] = {}
        self._patience = dict.fromkeys(range(len(futures)), SECONDS_FOR_A_VALUE)
        self._watch = watch or Watch(client)
        self._hanging: set[str] = set()

    def done(self) -> bool:
        """Whether all ranks have ended, well or not."""
        return self.error() is not None or len(self._values) == len(self._futures)

    def result(self) -> list[Any]:
        """Wait for the end; what each rank returned, by rank.

        Raises:
            The error of the rank that failed first, with that rank's traceback.
            WorkerLostError: if a worker process died, or hangs.
        """
        while not self.done():
            wait_a_moment(self._futures, 0.5)
        error = self.error()
        if error is not None:
            raise error
        return [self._values[rank] for rank in range(len(self._futures))]

    def error(self) -> BaseException | None:
        """The error of the rank that failed first; None while none has."""
        if self._error is None and (self._failures() or self._gone()):
            # The other ranks fail a moment later, and may have failed first; or they leave
            # together with one whose worker is to end.
            patience = SECONDS_TO_RETIRE if self._retired() else SECONDS_TO_FAIL
            deadline = time.monotonic() + patience
            while self._still_running() and time.monotonic() < deadline:
                time.sleep(0.1)
            self._error = self._cause()
            if self._error is not None:
                # A rank whose task is cancelled ends by itself, see `rank_task`.
                self._client.cancel([f for f in self._futures if not f.done()])
        return self._error

    def _cause(self) -> BaseException | None:
        gone = self._gone()
        if gone:
            silent = [self._workers[rank] for rank in gone if self._workers[rank] in self._hanging]
            if silent:
                return WorkerLostError(
                    f"the worker of rank {gone[0]} ({silent[0]}) has not answered for "
                    f"{SECONDS_OF_SILENCE:.0f} s: it was suspended, or cut off"
                )
            if self._retired() and not self._failures():
                return WorkerRetiredError(
                    f"the worker of rank {gone[0]} ({self._workers[gone[0]]}) was asked to leave"
                )
            # What the other ranks raised is that this one closed its connections.
            return WorkerLostError(
                f"the worker process of rank {gone[0]} ({self._workers[gone[0]]}) is gone: "
                "it was killed, ran out of memory, or its machine was lost"
            )
        first = min(self._failures(), key=lambda failure: failure.order, default=None)
        if first is None:
            return None  # a rank that seemed to be gone had ended well in the meantime
        return first.error.with_traceback(first.traceback)

    def _failures(self) -> list[Failure]:
        for rank, future in enumerate(self._futures):
            # Read once: it may change between two looks.
            status = future.status
            if rank in self._values or status == "pending":
                continue
            if status == "finished":
                # The value lies on a worker, which may hang by now.
                try:
                    self._values[rank] = future.result(timeout=self._patience[rank])
                except TimeoutError:
                    self._patience[rank] *= 2
            else:
                # Dask's own failure: the task never ran, or was cancelled.
                error = future.exception() if status == "error" else CancelledError()
                self._values[rank] = Failure(error, error.__traceback__)
        return [value for value in self._values.values() if isinstance(value, Failure)]

    def _still_running(self) -> bool:
        self._failures()
        return len(self._values) + len(self._gone()) < len(self._futures)

    def _retired(self) -> bool:
        """Whether the workers that are gone were asked to go."""
        gone = {self._workers[rank] for rank in self._gone()}
        # One that hangs has been asked by us, and does nothing of the sort.
        return bool(gone) and all(
            worker not in self._hanging and was_asked_to_leave(self._client, worker)
            for worker in gone
        )

    def _gone(self) -> list[int]:
        # A task that is pinned to a worker waits for it for ever, also when it has died.
        alive = self._watch.alive()
        # The end of one that hangs lets the others fail: they wait for what it will never send.
        self._hanging = self._watch.end_hanging(self._workers)
        return [
            rank
            for rank, worker in enumerate(self._workers)
            if rank not in self._values and worker not in alive
        ]


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
