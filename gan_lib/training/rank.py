"""One rank's work, from its parameters to its result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from gan_lib.base.interrupts import interruptible
from gan_lib.base.memory import keep_freed_memory
from gan_lib.data.batches import Batches
from gan_lib.data.datasets import training_images
from gan_lib.data.image_set import ImageSet
from gan_lib.parameters import TrainingParameters
from gan_lib.results.writing import ResultsHandler
from gan_lib.training.keeping import Keeper, RunKeeper, describe_training
from gan_lib.training.loop import run_epochs
from gan_lib.training.measuring import Measuring, quality_network
from gan_lib.training.networks import Training
from gan_lib.training.ranks import (
    ATTEMPT_VARIABLE,
    LEAVE,
    Ranks,
    check_machine,
    pick_compile,
    pick_device,
    restarts_before,
)
from gan_lib.training.result import TrainingResult
from gan_lib.training.resuming import claim_run

# What status.json says of a run that waits because a worker of it was asked to leave.
RETIRED = "a worker was asked to leave"


def train_gan(
    parameters: TrainingParameters | Mapping[str, Any] | None = None,
    *,
    run: str | None = None,
    images: ImageSet | Dataset[Any] | None = None,
    results: ResultsHandler | None = None,
    resume: bool = False,
    new_images: bool = False,
    local_rank: int | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a GAN as one rank: the only one, or one of those that torch.distributed knows.

    Ctrl-C or SIGTERM ends it after the current step, with a checkpoint, as `stop(now=True)` does,
    and is raised then; a second one ends it at once.

    Args:
        parameters: what to train; a mapping is checked like `TrainingParameters.from_mapping`.
        run: URL of the run directory to write; None writes none.
        images: train on these in place of `parameters.source`: prepared ones, or a torch
            Dataset of (image, label), which reads them anew each time (see `dataset_images`).
        results: also gets parameters.json and the records, e.g. a `DaskResultsHandler`.
        resume: go on from the newest whole checkpoint in `run`; from the start if there is none.
        new_images: resume also if the images are not those that `run` was trained on.
        local_rank: which GPU of this machine to take; None asks the environment variable
            LOCAL_RANK, and takes the first GPU if that is not set.
        progress: show a progress bar; None shows one if this process is no rank of a cluster.

    Raises:
        ParameterError: if the parameters are wrong, or differ between the ranks.
        SourceError: if there are no images.
        RunError: if `run` is taken, or `resume` finds other parameters or images there.
        DivergenceError: if a loss is no longer a finite number.
        ReplicaError: if the ranks' networks are no longer equal.
        OSError: if the run directory can no longer be written.
    """
    if not isinstance(parameters, TrainingParameters):
        parameters = TrainingParameters.from_mapping(parameters or {})
    check_machine(parameters)
    keep_freed_memory()
    ranks = Ranks()
    show = not ranks.distributed if progress is None else progress
    device = pick_device(parameters.device, local_rank)
    ranks.require_equal(
        "devices (a GPU, or a CPU)",
        device.type,
        "they round differently, and their networks would part. Set device to 'cpu', or leave the "
        "workers out that see no GPU",
    )
    images = training_images(parameters, images, resume, progress=show)
    checksum = images.checksum()
    ranks.require_equal("parameters and images", (parameters.to_dict(), checksum, resume))
    batches = Batches(images, parameters, ranks.rank, ranks.world_size, device)
    network = quality_network(parameters, len(images))

    training = Training(parameters, ranks, device, images.images_per_class())
    attempt = os.environ.get(ATTEMPT_VARIABLE, "")
    with interruptible(LEAVE):
        if run is not None:
            # Rank 0 decides whether the place is good, and all ranks hear of it.
            ranks.from_first(
                lambda: claim_run(run, parameters, images, resume, new_images, attempt)
            )
        keeper = Keeper(results if ranks.rank == 0 else None)
        if run is not None and ranks.rank == 0:
            keeper = RunKeeper(run, results, parameters, attempt)
        try:
            records: list[dict[str, Any]] = []
            resumed, compiled = None, None
            if resume:
                # Nobody is there to decide: a job that restarts begins anew if it has to.
                start_over = restarts_before(attempt) > 0
                state, records, damaged = ranks.from_first(lambda: keeper.take_up(start_over))
                if state:
                    training.load(state)
                    compiled = state.get("compiled", False)
                resumed = {"epoch": training.epoch, "damaged": damaged}
            steps = parameters.epochs * batches.steps_per_epoch
            if pick_compile(parameters, ranks, steps, compiled):
                training.compile()
            info = describe_training(training, batches, checksum)
            keeper.keep_parameters(info | {"resumed": resumed})
            keeper.keep_status("training")
            lines = ranks.from_first(keeper.measured)
            measuring = Measuring(training, images, network, lines, show)
            result = run_epochs(training, batches, keeper, measuring, records, show)
            retires = result.stopped and result.asked == "retire"
            ended = "waiting" if retires or result.asked == "regroup" else "stopped"
            reason = RETIRED if retires else result.reason
            keeper.close(ended if result.stopped else "finished", reason, result.note)
            # No rank ends, and lets its worker go, before all is written.
            ranks.gather(None)
        except BaseException as error:
            keeper.fail(error)
            raise
    result.run = run
    return result
