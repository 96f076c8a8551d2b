"""Many ranks: start or connect to a Dask cluster, and run one function as ranks on it.

`launch` puts one rank on each worker, lets them meet at a port of rank 0's
machine, and gives back a job to watch. What the ranks do there is the
function's own affair: this module knows nothing of GANs.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import pickle
import pkgutil
import socket
import tempfile
import time
import traceback
import uuid
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import dask
import psutil
import torch
import torch.distributed as dist
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Nanny, Scheduler, SpecCluster, get_worker
from distributed import wait as wait_for_futures

import gan_lib
from gan_lib.errors import ClusterError, RunError
from gan_lib.images import resolve_source
from gan_lib.manifest import manifest_text
from gan_lib.parameters import TrainingParameters
from gan_lib.results import PARAMETERS, STOP, Run, RunWriter, create_run, new_run_url, open_run
from gan_lib.training import train_gan
from gan_lib.watching import watch_run

LOOPBACK = "127.0.0.1"
SECONDS_TO_CONNECT = 5
# How long the other ranks may take to notice that one has failed.
SECONDS_TO_FAIL = 10


def start_cluster(n_workers: int | None = None, device: str = "auto") -> Client:
    """Start a Dask cluster of processes on this machine, reachable from this machine only.

    Args:
        n_workers: one rank will run on each; None takes one per GPU, or one per CPU core.
        device: "auto" uses the GPUs if there are any; "cpu" or "cuda" insist.

    Returns:
        A client; `close_cluster` ends the cluster with it.

    Raises:
        ClusterError: if "cuda" is wanted without a GPU, or `n_workers` is below 1.
    """
    if n_workers is not None and n_workers < 1:
        raise ClusterError(f"n_workers is {n_workers}: a cluster has at least 1 worker")
    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and n_gpus == 0:
        raise ClusterError("device is 'cuda', but this machine shows no GPU: use 'auto' or 'cpu'")
    if n_gpus:
        return Client(_gpu_cluster(n_workers or n_gpus, n_gpus))
    return Client(_cpu_cluster(n_workers or CPU_COUNT))


def connect(address: str) -> Client:
    """Connect to a Dask scheduler that is already running.

    Args:
        address: for example "tcp://10.0.0.1:8786".

    Raises:
        ClusterError: if nothing answers there.
    """
    try:
        client = Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r}: check the address that "
            f"`dask scheduler` printed, and that this machine may reach it"
        ) from error
    _ship_package(client)
    return client


def close_cluster(client: Client) -> None:
    """Close a client, and the cluster too if `start_cluster` made it."""
    cluster = client.cluster
    client.close()
    if cluster is not None:
        cluster.close()


def launch(
    client: Client,
    parameters: TrainingParameters | Mapping[str, Any] | None = None,
    run: str | None = None,
    n_workers: int | None = None,
    resume: bool = False,
    function: Callable[..., Any] = train_gan,
) -> Job:
    """Train on the workers of a cluster, one rank on each; returns at once.

    Args:
        client: of the cluster.
        parameters: what to train; a mapping is checked like `TrainingParameters.from_mapping`.
        run: URL of the run directory, which rank 0 must be able to write and this
            process to read; None makes a new one under `runs/`.
        n_workers: use only this many; None uses all.
        resume: go on from the newest checkpoint in `run`.
        function: called on each rank as `function(parameters=..., run=..., resume=...)`.

    Raises:
        ParameterError: if the parameters are wrong.
        RunError: if the run directory is taken, or a worker cannot see it.
        ClusterError: if there are too few workers.
    """
    if not isinstance(parameters, TrainingParameters):
        parameters = TrainingParameters.from_mapping(parameters or {})
    parameters = parameters.replace(source=resolve_source(parameters.source))
    places = _places(client, n_workers)
    _ship_package(client)
    url = _absolute(run or new_run_url())
    if resume:
        open_run(url)  # raises if there is none
    else:
        create_run(url, parameters)
    first = places[0].worker
    if not client.run(_sees_run, url, workers=[first])[first]:
        raise RunError(
            f"the worker {first} sees no run at {url}: give a place that workers and client "
            "share, such as s3://bucket/run"
        )
    arguments = {"parameters": parameters, "run": url, "resume": resume}
    return Job(client, _submit(client, places, parameters.device, function, arguments), url)


def run_ranks(
    client: Client,
    function: Callable[..., Any],
    n_workers: int | None = None,
    device: str = "auto",
    **arguments: Any,
) -> list[Any]:
    """Run any function as one rank on each worker, and wait for what the ranks return.

    Inside it, torch.distributed is initialised.

    Args:
        client: of the cluster.
        function: called on each rank as `function(**arguments)`.
        n_workers: use only this many; None uses all.
        device: "cpu" insists on gloo; otherwise NCCL is taken where every rank has a GPU.
        **arguments: for the function.

    Returns:
        The ranks' results, by rank.

    Raises:
        As `Job.result`.
    """
    places = _places(client, n_workers)
    _ship_package(client)
    return RankGroup(client, _submit(client, places, device, function, arguments)).result()


@dataclass(frozen=True)
class _Place:
    """Where a rank goes: a worker, its machine, and its number on that machine."""

    worker: str
    host: str
    local_rank: int


def _submit(
    client: Client,
    places: list[_Place],
    device: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> dict[str, Future]:
    """Start one rank on each place; worker -> future, by rank."""
    backend = _choose_backend(client, places, device)
    first = places[0]
    job_id = uuid.uuid4().hex
    port = client.run(_listen, job_id, first.host, workers=[first.worker])[first.worker]
    return {
        place.worker: client.submit(
            _work_as_rank,
            function,
            arguments,
            rank=rank,
            world_size=len(places),
            local_rank=place.local_rank,
            backend=backend,
            host=first.host,
            port=port,
            job_id=job_id,
            # A key of its own: Dask would answer equal work from its cache, and train nothing.
            key=f"rank-{rank}-{job_id}",
            pure=False,
            workers=[place.worker],
            allow_other_workers=False,
        )
        for rank, place in enumerate(places)
    }


class RankGroup:
    """Ranks that run together on a cluster, and fail together.

    Attributes:
        workers: addresses of their workers, by rank.
    """

    def __init__(self, client: Client, futures: Mapping[str, Future]) -> None:
        self.workers = list(futures)
        self._client = client
        self._futures = list(futures.values())
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether all ranks have ended, well or not."""
        return self.error() is not None or all(future.done() for future in self._futures)

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for the end; what each rank returned, by rank.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            The error of the rank that failed first, with that rank's traceback.
            ClusterError: if a worker process died.
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
        return [future.result() for future in self._futures]

    def error(self) -> BaseException | None:
        """The error of the rank that failed first; None while none has."""
        if self._error is None and (self._failures() or self._gone()):
            # The other ranks fail a moment later, and may have failed first.
            deadline = time.monotonic() + SECONDS_TO_FAIL
            while self._still_running() and time.monotonic() < deadline:
                time.sleep(0.1)
            self._error = self._cause()
            self._client.cancel([f for f in self._futures if not f.done()])
        return self._error

    def _cause(self) -> BaseException:
        gone = self._gone()
        if gone:
            # What the other ranks raised is that this one closed its connections.
            return ClusterError(
                f"the worker process of rank {gone[0]} ({self.workers[gone[0]]}) is gone: "
                "it was killed, ran out of memory, or its machine was lost; start again with "
                "the workers that are left (launch goes on from the last checkpoint with "
                "run=... and resume=True)"
            )
        first = min(self._failures(), key=lambda failure: failure.order)
        return first.error.with_traceback(first.traceback)

    def _failures(self) -> list[_Failure]:
        failures = []
        for future in self._futures:
            if future.status == "finished":
                value = future.result()
                if isinstance(value, _Failure):
                    failures.append(value)
            elif future.done():
                # Dask's own failure: the task never ran, or was cancelled.
                error = future.exception() if future.status == "error" else CancelledError()
                failures.append(_Failure(_LAST, error, error.__traceback__))
        return failures

    def _still_running(self) -> bool:
        gone = self._gone()
        return any(not f.done() for rank, f in enumerate(self._futures) if rank not in gone)

    def _gone(self) -> list[int]:
        # A task that is pinned to a worker waits for it for ever, also when it has died.
        alive = _workers(self._client)
        return [
            rank
            for rank, (future, worker) in enumerate(zip(self._futures, self.workers, strict=True))
            if not future.done() and worker not in alive
        ]


class Job(RankGroup):
    """A training that runs on a cluster.

    Attributes:
        run: its run directory, to be read at any time.
    """

    def __init__(self, client: Client, futures: Mapping[str, Future], url: str) -> None:
        super().__init__(client, futures)
        self.run: Run = open_run(url)

    def __repr__(self) -> str:
        return f"<Job {self.status} on {len(self.workers)} workers, {self.run.url}>"

    @property
    def status(self) -> str:
        """What the job does: "waiting", "training", "stopped", "finished" or "failed"."""
        if self.error() is not None:
            return "failed"
        said = self.run.status().state
        return said if self.done() or said == "training" else "waiting"

    def error(self) -> BaseException | None:
        """The error of the rank that failed first; None while none has."""
        known = self._error
        error = super().error()
        if error is not None and known is None:
            # A rank that was killed could not say so itself.
            with contextlib.suppress(OSError):
                RunWriter(self.run.url).set_status("failed", error=str(error))
        return error

    def watch(self) -> None:
        """Show the progress until the job ends, and raise its error if it fails.

        An interrupt stops the watching, not the job.
        """
        try:
            watch_run(self.run, goes_on=lambda: not self.done())
        except KeyboardInterrupt:
            print("stopped watching; the job goes on: watch() looks again, stop() ends it")
            return
        self.result()

    def stop(self) -> None:
        """Ask the job to end after the current epoch, with a picture and a checkpoint."""
        if not self.done():
            RunWriter(self.run.url).submit_result(STOP, "")


# Listening sockets by job: opened before the ranks start, so that the port is known to be free.
_LISTENERS: dict[str, socket.socket] = {}


def _listen(job_id: str, host: str) -> int:
    """On rank 0's worker: reserve a free port for the ranks to meet at."""
    listener = socket.create_server((host, 0), family=_family(host), backlog=1024)
    _LISTENERS[job_id] = listener
    return listener.getsockname()[1]


def _work_as_rank(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    backend: str,
    host: str,
    port: int,
    job_id: str,
) -> Any:
    """On a worker: meet the other ranks, run the function, and part."""
    if dist.is_initialized():
        raise ClusterError(
            "this worker is already a rank of another job: wait for that one, "
            "or start the workers with one thread each"
        )
    _use_dask_network()
    os.environ["LOCAL_RANK"] = str(local_rank)
    listener = _LISTENERS.pop(job_id, None)
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=datetime.timedelta(seconds=300),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        return function(**arguments)
    except Exception as error:
        # While this rank holds its connections, no other rank has noticed: so the order in
        # which they count themselves here is the order in which they failed.
        order = _LAST
        with contextlib.suppress(Exception):
            order = store.add("failures", 1)
        error.add_note(f"raised by rank {rank} of {world_size} on {get_worker().address}")
        return _Failure(order, *_portable(error))
    finally:
        dist.destroy_process_group()


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


def _use_dask_network() -> None:
    """Let gloo and NCCL use the network interface that Dask uses, unless told otherwise.

    Their own choice follows the machine's host name, which on a laptop may be a
    network that others can reach and on a cluster one that leads nowhere.
    """
    host = get_worker().address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _workers(client: Client) -> dict[str, Any]:
    # scheduler_info() lists five workers unless it is asked for all.
    return client.scheduler_info(n_workers=-1)["workers"]


def _places(client: Client, n_workers: int | None) -> list[_Place]:
    """Where the ranks go, by rank: those of one machine next to each other."""
    wanted = n_workers or 1
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(wanted, timeout=SECONDS_TO_CONNECT)
    workers = _workers(client)
    if len(workers) < wanted:
        raise ClusterError(
            f"the cluster has {len(workers)} workers and {wanted} are needed: "
            "start more workers, or ask for fewer"
        )
    places: list[_Place] = []
    on_host: dict[str, int] = {}
    for address in sorted(workers, key=lambda a: (workers[a]["host"], a))[: n_workers or None]:
        host = workers[address]["host"]
        places.append(_Place(address, host, local_rank=on_host.get(host, 0)))
        on_host[host] = on_host.get(host, 0) + 1
    return places


def _visible_gpus() -> list[str]:
    """On a worker: identities of the GPUs that it sees."""
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def _choose_backend(client: Client, places: list[_Place], device: str) -> str:
    """NCCL if every rank has a GPU to itself; gloo otherwise, which NCCL refuses."""
    if device == "cpu":
        return "gloo"
    seen = client.run(_visible_gpus, workers=[place.worker for place in places])
    taken = set()
    for place in places:
        gpus = seen[place.worker]
        if not gpus:
            return "gloo"
        taken.add(gpus[place.local_rank % len(gpus)])
    return "nccl" if len(taken) == len(places) else "gloo"


def _sees_run(url: str) -> bool:
    return RunWriter(url).exists(PARAMETERS)


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).expanduser().resolve())


# glibc gives freed memory back above this many bytes, and Dask's nanny sets 64 KiB so that
# workers look small. A training step frees and takes the same hundred megabytes each time,
# and spent a quarter of its time in page faults: let it keep them.
_KEEP_MEMORY = str(2**30)


def _worker_environment(n_workers: int) -> dask.config.set:
    """A context in which nannies start workers that train well next to each other."""
    return dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": {
                "MALLOC_TRIM_THRESHOLD_": _KEEP_MEMORY,
                "MALLOC_MMAP_THRESHOLD_": _KEEP_MEMORY,
                # Ranks share the cores: torch would start a thread per core in each of them.
                "OMP_NUM_THREADS": str(max(1, CPU_COUNT // n_workers)),
            }
        }
    )


# Whatever a local cluster listens on, only this machine can reach.
_LOCAL = {"host": LOOPBACK, "dashboard_address": f"{LOOPBACK}:0"}
# A rank holds its images in memory; Dask would pause it as if it were a leak.
_WORKER = {"memory_limit": 0}


def _cpu_cluster(n_workers: int) -> LocalCluster:
    with _worker_environment(n_workers):
        return LocalCluster(n_workers=n_workers, threads_per_worker=1, **_LOCAL, **_WORKER)


def _gpu_cluster(n_workers: int, n_gpus: int) -> SpecCluster:
    """One worker per GPU; more workers than GPUs share them, for trying things out."""
    with contextlib.suppress(ImportError), _worker_environment(n_workers):
        from dask_cuda import LocalCUDACluster

        if n_workers <= n_gpus:
            return LocalCUDACluster(n_workers=n_workers, threads_per_worker=1, **_LOCAL, **_WORKER)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    gpus = shown.split(",")
    workers = {
        i: {
            "cls": Nanny,
            "options": {
                "host": LOOPBACK,
                "nthreads": 1,
                "env": {"CUDA_VISIBLE_DEVICES": gpus[i % n_gpus]},
                **_WORKER,
            },
        }
        for i in range(n_workers)
    }
    with _worker_environment(n_workers):
        return SpecCluster(scheduler={"cls": Scheduler, "options": _LOCAL}, workers=workers)


def package_checksum() -> str:
    """SHA-256 of the package's own source and manifest: equal where the code is equal."""
    digest = hashlib.sha256(manifest_text().encode())
    for name in _module_names():
        digest.update(_module_source(name))
    return digest.hexdigest()


def _module_names() -> list[str]:
    return ["__init__", *sorted(m.name for m in pkgutil.iter_modules(gan_lib.__path__))]


def _module_source(name: str) -> bytes:
    return gan_lib.__spec__.loader.get_data(os.path.join(gan_lib.__path__[0], f"{name}.py"))


def _ship_package(client: Client) -> None:
    """Make this very gan_lib importable on the scheduler and on all workers, now and later.

    Raises:
        ClusterError: if some of them keep another version.
    """
    if _all_have_package(client):
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = os.path.join(folder, f"gan_lib_{package_checksum()[:8]}.zip")
        with zipfile.ZipFile(archive, "w") as file:
            for name in _module_names():
                file.writestr(f"gan_lib/{name}.py", _module_source(name))
            file.writestr("gan_lib/data_manifest.json", manifest_text())
        client.upload_file(archive)
    if not _all_have_package(client):
        raise ClusterError(
            "the cluster runs another version of gan_lib: restart its workers, "
            "or install this version there"
        )


def _all_have_package(client: Client) -> bool:
    mine = package_checksum()
    # Where gan_lib is missing, the function itself cannot be loaded.
    found = list(client.run(package_checksum, on_error="return").values())
    try:
        found.append(client.run_on_scheduler(package_checksum))
    except ImportError:
        return False
    return all(checksum == mine for checksum in found)
