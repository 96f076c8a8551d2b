"""One rank's work: the loop around the two steps, from the first epoch or from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gan_lib.base.interrupts import interruptible
from gan_lib.base.progress import ProgressBar, progress_text
from gan_lib.base.weights import weights_checksum
from gan_lib.data.batches import Batches
from gan_lib.data.datasets import training_images
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.models import Generator
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES
from gan_lib.results.writing import ResultsHandler
from gan_lib.training.keeping import Keeper, RunKeeper, describe_training
from gan_lib.training.measuring import Measuring, quality_network
from gan_lib.training.networks import Training
from gan_lib.training.ranks import (
    ATTEMPT_VARIABLE,
    LEAVE,
    Ranks,
    pick_device,
    restarts_before,
)
from gan_lib.training.resuming import claim_run
from gan_lib.training.stopwatch import Stopwatch

# The ranks compare losses, and hear of a request to stop, at least this often.
STEPS_BETWEEN_EXCHANGES = 10


@dataclass
class TrainingResult:
    """What one rank brings back.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        device: "cpu" or "cuda:0".
        epochs: trained in this call.
        iterations: optimiser steps in this call.
        seconds: from the first step to the last.
        images_per_second: over all ranks together.
        weights_sha256: of generator and discriminator, equal on all ranks.
        stopped: whether it was asked to stop before its last epoch.
        reason: why it ended by itself before that, in a sentence.
        asked: for what: "epoch", "now" or "regroup" (to go on with more ranks).
        run: URL of the run directory, if one was written.
        records: one dictionary per recorded iteration (rank 0 only).
        quality: one dictionary per measured epoch, see `gan_lib.results.run.Run.quality`.
        generator: the trained generator, if this was the only rank.
    """

    rank: int
    world_size: int
    device: str
    epochs: int
    iterations: int
    seconds: float
    images_per_second: float
    weights_sha256: str
    stopped: bool
    reason: str
    asked: str
    run: str | None
    records: list[dict[str, Any]] = field(repr=False, default_factory=list)
    quality: list[dict[str, Any]] = field(repr=False, default_factory=list)
    generator: Generator | None = field(repr=False, default=None)


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
    ranks = Ranks()
    show = not ranks.distributed if progress is None else progress
    device = pick_device(parameters.device, local_rank)
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
            resumed = None
            if resume:
                # Nobody is there to decide: a job that restarts begins anew if it has to.
                start_over = restarts_before(attempt) > 0
                state, records, damaged = ranks.from_first(lambda: keeper.take_up(start_over))
                if state:
                    training.load(state)
                resumed = {"epoch": training.epoch, "damaged": damaged}
            info = describe_training(training, batches, checksum)
            keeper.keep_parameters(info | {"resumed": resumed})
            keeper.keep_status("training")
            lines = ranks.from_first(keeper.measured)
            measuring = Measuring(training, images, network, lines, show)
            result = _run_epochs(training, batches, keeper, measuring, records, show)
            ended = "waiting" if result.asked == "regroup" else "stopped"
            keeper.close(ended if result.stopped else "finished", result.reason)
        except BaseException as error:
            keeper.fail(error)
            raise
    result.run = run
    return result


def _run_epochs(
    training: Training,
    batches: Batches,
    keeper: Keeper,
    measuring: Measuring,
    records: list[dict[str, Any]],
    show: bool,
) -> TrainingResult:
    """Train until the last epoch, until it no longer gets better, or somebody asks to stop.

    `records` are those of the epoch that the training is inside of.
    """
    p, ranks = training.parameters, training.ranks
    first_epoch, first_iteration = training.epoch, training.iteration
    todo = max(0, (p.epochs - first_epoch) * batches.steps_per_epoch - training.steps_done)
    asked = ""
    all_records: list[dict[str, Any]] = []
    stopwatch = Stopwatch()
    with ProgressBar(todo, "training", "step", show=show, forecast=True) as bar:
        while training.epoch < p.epochs and not asked and not measuring.enough():
            leave = _run_steps(training, batches, keeper, records, stopwatch, bar)
            if training.steps_done < batches.steps_per_epoch:
                keeper.keep_part(records, training.state())
                asked = "now"
            else:
                asked = _end_epoch(training, keeper, measuring, records, leave)
            all_records += records
            records = []
    reason = measuring.enough() if training.epoch < p.epochs else ""
    return TrainingResult(
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=str(training.device),
        epochs=training.epoch - first_epoch,
        iterations=training.iteration - first_iteration,
        seconds=stopwatch.seconds(),
        images_per_second=stopwatch.rate(),
        weights_sha256=weights_checksum(*(n.state_dict() for n in training.networks.values())),
        stopped=bool(asked) and training.epoch < p.epochs and not reason,
        reason=reason,
        asked=asked,
        run=None,
        records=all_records if ranks.rank == 0 else [],
        quality=measuring.lines,
        generator=None if ranks.distributed else training.artist().cpu().eval(),
    )


def _run_steps(
    training: Training,
    batches: Batches,
    keeper: Keeper,
    records: list[dict[str, Any]],
    stopwatch: Stopwatch,
    bar: ProgressBar,
) -> bool:
    """The steps of an epoch that are not done yet; True if the ranks are to stop at once."""
    p, ranks, epoch = training.parameters, training.ranks, training.epoch + 1
    losses: list[Tensor] = []
    for batch in stopwatch.over(batches.epoch(epoch, training.steps_done)):
        found = training.step(batch)
        losses.append(torch.stack([found[name] for name in LOSSES]) * batch.weight)
        due = training.iteration % p.record_every == 0
        complete = training.steps_done == batches.steps_per_epoch
        leave, now = False, LEAVE.is_set() and not ranks.distributed
        if due or complete or now or len(losses) == STEPS_BETWEEN_EXCHANGES:
            wish = LEAVE.is_set() or keeper.asked_now
            steps, leave = ranks.exchange(losses, wish)
            training.check_losses(steps)
            losses = []
            if due:
                place = {"iteration": training.iteration, "epoch": epoch}
                means = dict(zip(LOSSES, steps[-1], strict=True))
                records.append(place | means | stopwatch.record())
                keeper.keep_records(epoch, records)
        bar.update(1, progress_text(records[-1], p.epochs) if records else "")
        if leave:
            return True
    return False


def _end_epoch(
    training: Training,
    keeper: Keeper,
    measuring: Measuring,
    records: list[dict[str, Any]],
    leave: bool,
) -> str:
    """Bring the ranks together and keep what is due; what somebody asked for."""
    p, ranks = training.parameters, training.ranks
    training.average_statistics()
    training.epoch += 1
    training.steps_done = 0
    asked = "now" if leave else ranks.from_first(keeper.asked)
    ends = training.epoch == p.epochs or asked == "epoch"
    # Who asks for the end now does not wait for a measurement.
    quality = measuring.measure() if asked != "now" and measuring.due(ends) else None
    best = quality is not None and measuring.is_best()
    last = bool(asked) or training.epoch == p.epochs or best or bool(measuring.enough())
    if last or training.epoch % p.checkpoint_every == 0:
        training.check_weights()
        ranks.require_equal_weights(training.networks)
    keeper.keep_epoch(training, records, last, quality)
    return asked
