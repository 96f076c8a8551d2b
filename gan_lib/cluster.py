"""Many ranks: start or connect to a Dask cluster, and train on it.

`launch` puts one rank on each worker and gives back a job to watch. This module
carries `train_gan` to the workers and knows nothing of what it does there.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Nanny, Security
from distributed.client import ensure_default_client

from gan_lib.batches import check_images
from gan_lib.errors import ClusterError, ParameterError, RunError, SourceError, describe
from gan_lib.images import CacheNotSharedError, ImageSet, prepare_images
from gan_lib.interrupts import exit_on_sigterm, interruptible
from gan_lib.jobs import Job, Plan, end_jobs
from gan_lib.keeping import refuse_differences, refuse_other_images
from gan_lib.listing import check_source, resolve_source
from gan_lib.parameters import TrainingParameters
from gan_lib.rank_group import RankGroup, start_ranks
from gan_lib.reach import failures, require_shared, see
from gan_lib.results import PARAMETERS, create_run, new_run_url, open_run, refuse_taken
from gan_lib.shards import INDEX
from gan_lib.shipping import ship_package
from gan_lib.storage import absolute
from gan_lib.training import train_gan
from gan_lib.workers import find_places, in_thread, require_some_workers, wait_for_workers

LOOPBACK = "127.0.0.1"
SECONDS_TO_CONNECT = 5


def start_cluster(n_workers: int | None = None, device: str = "auto") -> Client:
    """Start a Dask cluster of processes on this machine, for this client alone.

    Scheduler and workers listen on loopback and speak TLS, with certificates that only they and
    this process hold: whoever could send them work could do it as the user who started them.
    That covers what goes through Dask. The ranks of a training talk among themselves (gloo,
    NCCL) on loopback too, unencrypted, and Dask's dashboard shows itself to all on this machine.

    Args:
        n_workers: one rank will run on each; None takes one per GPU, or one per CPU core.
        device: "auto" uses the GPUs if there are any; "cpu" or "cuda" insist.

    Returns:
        A client; `close_cluster` ends the cluster with it.

    Raises:
        ClusterError: if "cuda" is wanted without a GPU, `n_workers` is below 1, or workers end
            before they have started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker imports the script that starts it, and has come to this line of it. Without a
        # word: there are many of them, and the process that waits for them tells it once.
        sys.exit(1)
    require_some_workers(n_workers)
    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and n_gpus == 0:
        raise ClusterError("device is 'cuda', but this machine shows no GPU: use 'auto' or 'cpu'")
    n_workers = n_workers or n_gpus or CPU_COUNT
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    try:
        cluster = LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            host=LOOPBACK,
            dashboard_address=f"{LOOPBACK}:0",
            security=Security.temporary(),
            # A rank holds its images in memory; Dask would pause it as if it were a leak.
            memory_limit=0,
            worker_class=_TrainingNanny,
            n_threads=max(1, CPU_COUNT // n_workers),
            gpus=shown.split(",")[:n_gpus],
        )
    except RuntimeError as error:
        raise ClusterError(
            f"the workers did not start ({error.__cause__ or error}): in a script, put this under "
            '`if __name__ == "__main__":`, because a worker begins by importing the script; '
            "anywhere else, see what they have printed"
        ) from None
    # Others may shrink and grow by rules of their own, and belong to whoever made them.
    cluster.made_by_gan_lib = True
    return Client(cluster)


def connect(address: str, n_workers: int = 1, security: Security | None = None) -> Client:
    """Connect to a Dask scheduler that is already running, and has workers.

    Args:
        address: for example "tcp://10.0.0.1:8786", or "tls://..." for one that encrypts.
        n_workers: there must be at least so many; those that are starting are waited for.
        security: certificates, for "tls://"; None takes those of Dask's configuration
            (`distributed.comm.tls`). They cover what goes through Dask; the ranks of a training
            talk among themselves (gloo, NCCL) unencrypted.

    Raises:
        ClusterError: if nothing answers there, certificates are missing or do not fit, or there
            are too few workers, or workers that cannot do what training needs.
    """
    require_some_workers(n_workers)
    try:
        # Dask waits for ever for what listens and is no scheduler, such as a dashboard: then
        # nobody should get that client by default, either.
        client = in_thread(
            lambda: Client(
                address, timeout=SECONDS_TO_CONNECT, security=security, set_as_default=False
            )
        ).result(2 * SECONDS_TO_CONNECT)
    except TypeError as error:
        if "ssl_context" not in str(error):
            raise
        raise ClusterError(
            f"the scheduler at {address} wants certificates, and there are none: give "
            "connect(address, security=distributed.Security(tls_ca_file=..., tls_client_cert=..., "
            "tls_client_key=...)), or set distributed.comm.tls in Dask's configuration"
        ) from None
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} ({describe(error)}): check the address that "
            "`dask scheduler` printed (tls:// where it encrypts), the certificates, and that this "
            "machine may reach it"
        ) from error
    try:
        wait_for_workers(client, n_workers)
        ship_package(client)
    except BaseException:
        client.close()
        raise
    ensure_default_client(client)
    return client


def close_cluster(client: Client) -> None:
    """Close a client, and the cluster too if `start_cluster` made it."""
    end_jobs(client)
    cluster = client.cluster
    client.close()
    if getattr(cluster, "made_by_gan_lib", False):
        cluster.close()


def launch(
    client: Client,
    parameters: TrainingParameters | Mapping[str, Any] | None = None,
    run: str | None = None,
    n_workers: int | None = None,
    resume: bool = False,
    function: Callable[..., Any] = train_gan,
    min_workers: int = 1,
    max_restarts: int = 10,
    grace: float = 20.0,
    new_images: bool = False,
) -> Job:
    """Train on the workers of a cluster, one rank on each.

    Returns as soon as the images are prepared, which the workers do first (see
    `prepare_images`), and the ranks have been started. When a worker is lost or hangs, or
    storage cannot be written, the job goes on from the last checkpoint with the workers that
    there are then; a worker that joins is taken in after an epoch. What the user said wrong,
    and errors of the code, end it. When this process ends (from now on SIGTERM ends it as
    `sys.exit` does), the job keeps a checkpoint and ends with it.

    Args:
        client: of the cluster.
        parameters: what to train; a mapping is checked like `TrainingParameters.from_mapping`.
        run: URL of the run directory, which rank 0 must be able to write and this
            process to read; None makes a new one under `runs/`.
        n_workers: use only this many; None uses all.
        resume: go on from the newest checkpoint in `run`; a job that still trains it ends.
        function: called on each rank as `function(parameters=..., run=..., resume=...)`.
        min_workers: go on with no fewer than these.
        max_restarts: end with the cause after so many restarts.
        grace: seconds to wait for as many workers as before, before going on with fewer.
        new_images: resume also if the images are not those that `run` was trained on.

    Raises:
        ParameterError: if the parameters are wrong.
        RunError: if the run directory is taken, a worker cannot see it, or `resume` finds other
            parameters or images there.
        SourceError: if there are no images.
        ClusterError: if there are too few workers, or other jobs use them.
    """
    exit_on_sigterm()
    if min_workers < 1 or max_restarts < 0 or grace < 0:
        raise ParameterError(
            f"min_workers is {min_workers}, max_restarts {max_restarts}, grace {grace}: expected "
            "at least 1, 0 and 0"
        )
    require_some_workers(n_workers)
    if not isinstance(parameters, TrainingParameters):
        for name in inspect.signature(launch).parameters:
            if isinstance(parameters, Mapping) and name in parameters:
                raise ParameterError(
                    f"{name} is no parameter of the training, but an argument: "
                    f"launch(client, parameters, {name}=...)"
                )
        parameters = TrainingParameters.from_mapping(parameters or {})
    parameters = parameters.replace(source=resolve_source(parameters.source))
    wait_for_workers(client, max(n_workers or 1, min_workers))
    ship_package(client)
    places = find_places(client, max(n_workers or 1, min_workers), n_workers)
    url = absolute(run or new_run_url())
    # All that may be wrong is looked for before anything of the run is written.
    if resume:
        refuse_differences(url, open_run(url).parameters, parameters)
    else:
        refuse_taken(url)
    require_shared(
        client,
        url,
        PARAMETERS if resume else "",
        lambda why: RunError(
            f"the run directory {url} cannot be used {why}. Give a place that workers and client "
            "share and may write to, such as s3://bucket/run"
        ),
    )
    images = _prepare_on_workers(client, parameters)
    if images is not None:
        check_images(images, parameters, resume)
        if resume and not new_images:
            refuse_other_images(url, images)
    prepared = images.prepared if images is not None else ""
    plan = Plan(
        parameters, function, n_workers, min_workers, max_restarts, grace, prepared, new_images
    )
    job = None
    try:
        # Who reserves a run watches over it: until then, an interrupt waits.
        with interruptible(threading.Event()):
            if not resume:
                create_run(url, parameters)
            job = Job(client, url, plan, places, resume)
        job.wait_for_ranks()
    except BaseException:
        if job is not None:
            job.abandon()
        raise
    return job


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
    require_some_workers(n_workers)
    ship_package(client)
    places = find_places(client, n_workers or 1, n_workers)
    return RankGroup(client, start_ranks(client, places, device, function, arguments)).result()


def _prepare_on_workers(client: Client, p: TrainingParameters) -> ImageSet | None:
    """The images, in the cache from which the ranks open them; None if it is not theirs too."""
    try:
        images = prepare_images(
            p.source, p.image_size, p.channels, p.crop, p.max_images, client=client
        )
        if images.prepared:
            for worker, why in failures(client, see, images.prepared, INDEX).items():
                raise CacheNotSharedError(f"the worker {worker} cannot read the cache: {why}")
            return images
    except CacheNotSharedError as error:
        # Not wrong, only slower: each machine has a cache of its own, and decodes for itself.
        print(f"every worker's machine prepares the images for itself, because {error}")
        images = None
    for worker, why in failures(client, check_source, p.source).items():
        raise SourceError(f"the worker {worker} cannot read the images: {why}")
    return images


# glibc gives freed memory back above this many bytes, and Dask's nanny sets 64 KiB so that
# workers look small. A training step frees and takes the same hundred megabytes each time,
# and spent a quarter of its time in page faults: let it keep them.
_KEEP_MEMORY = str(2**30)


_WORKER_CONFIG = {
    # Dask looks at what its tasks do 100 times a second, and at its event loop 50 times,
    # in the process that is to train: 3 % of a core, and half a per cent without.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
}


class _TrainingNanny(Nanny):
    """Starts a worker that trains well next to others, also one that comes or is replaced later.

    Args:
        n_threads: of torch, in the worker.
        gpus: of which each worker sees one; more workers than GPUs share them.
        name: the number of the worker, which the cluster gives.
    """

    def __init__(
        self, *arguments: Any, n_threads: int, gpus: Sequence[str], name: int, **named: Any
    ) -> None:
        preload = [
            *dask.config.get("distributed.worker.preload"),
            # Ctrl-C in a terminal or a notebook reaches the workers too, and would end them.
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        ]
        super().__init__(*arguments, name=name, config=_WORKER_CONFIG, preload=preload, **named)
        environment = {
            "MALLOC_TRIM_THRESHOLD_": _KEEP_MEMORY,
            "MALLOC_MMAP_THRESHOLD_": _KEEP_MEMORY,
            # Ranks share the cores: torch would start a thread per core in each of them.
            "OMP_NUM_THREADS": str(n_threads),
            # One thread of obstore waits for all requests; two also wake each other.
            "TOKIO_WORKER_THREADS": "1",
            # When a rank is lost, torch prints a page of C++ frames on each of the others.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        # What glibc and numpy read has to be there before the process is, which inherits it.
        self.pre_spawn_env.update(environment)
        self.env.update(environment)
        if gpus:
            # Not inherited, because this process may use another.
            self.env["CUDA_VISIBLE_DEVICES"] = gpus[name % len(gpus)]
