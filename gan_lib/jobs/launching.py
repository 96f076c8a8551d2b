"""Training on a cluster: look first, then reserve the run, then start a job."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from distributed import Client

from gan_lib.base.addresses import absolute
from gan_lib.base.errors import ParameterError, RunError, SourceError
from gan_lib.base.interrupts import exit_on_sigterm, interruptible
from gan_lib.cluster.reach import failures, require_shared, see
from gan_lib.cluster.shipping import ship_package
from gan_lib.cluster.workers import Watch, find_places, require_some_workers, wait_for_workers
from gan_lib.data.batches import check_images
from gan_lib.data.checking import check_source
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import CacheNotSharedError, prepare_images
from gan_lib.data.prepared import INDEX
from gan_lib.jobs.job import Job
from gan_lib.jobs.rank_group import RankGroup, start_ranks
from gan_lib.jobs.supervisor import Plan
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import PARAMETERS
from gan_lib.results.run import open_run
from gan_lib.results.writing import create_run, new_run_url, refuse_taken
from gan_lib.sources.source import resolve_source
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import check_machine
from gan_lib.training.resuming import (
    refuse_differences,
    refuse_impatience,
    refuse_other_images,
)


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
    and errors of the code, end it. Its workers are its own for as long as it goes on: no other
    job takes one of them, whoever launches it. When this process ends (from now on SIGTERM ends
    it as `sys.exit` does), the job keeps a checkpoint and ends with it.

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
    url = absolute(run or new_run_url())
    watch, job = Watch(client), None
    try:
        # From here on they are this job's, and others look elsewhere.
        places = find_places(client, max(n_workers or 1, min_workers), n_workers, watch)
        # All that may be wrong is looked for before anything of the run is written.
        if resume:
            refuse_differences(url, open_run(url).parameters, parameters)
            refuse_impatience(url, parameters)
        else:
            refuse_taken(url)
        require_shared_run(client, url, PARAMETERS if resume else "")
        if parameters.sync_norm or parameters.compile == "on":
            for worker, why in failures(client, check_machine, parameters).items():
                raise ParameterError(f"{why} (that was the worker {worker})")
        images = _prepare_on_workers(client, parameters)
        if images is not None:
            check_images(images, parameters, resume)
            if resume and not new_images:
                refuse_other_images(url, images)
        prepared = images.prepared if images is not None else ""
        plan = Plan(
            parameters, function, n_workers, min_workers, max_restarts, grace, new_images, prepared
        )
        # Who reserves a run watches over it: until then, an interrupt waits.
        with interruptible(threading.Event()):
            if not resume:
                create_run(url, parameters)
            job = Job(watch, url, plan, places, resume)
        job.wait_for_ranks()
    except BaseException:
        if job is not None:
            job.abandon()
        else:
            watch.release()
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
    watch = Watch(client)
    try:
        places = find_places(client, n_workers or 1, n_workers, watch)
        futures = start_ranks(client, places, device, function, arguments)
        return RankGroup(client, futures, watch).result()
    finally:
        watch.release()


def require_shared_run(client: Client, url: str, path: str) -> None:
    """Raise RunError unless this process and each worker read and write the same folder of runs.

    `path` is as in `require_shared`.
    """
    require_shared(
        client,
        url,
        path,
        lambda why: RunError(
            f"the run directory {url} cannot be used {why}. Give a place that workers and client "
            "share and may write to, such as s3://bucket/run"
        ),
    )


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
