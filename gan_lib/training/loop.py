"""The loop around the two steps: epochs, steps, and what ends them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gan_lib.base.progress import ProgressBar, progress_text
from gan_lib.base.weights import weights_checksum
from gan_lib.data.batches import Batches
from gan_lib.results.files import LOSSES
from gan_lib.training.keeping import Keeper
from gan_lib.training.measuring import Measuring
from gan_lib.training.networks import Training
from gan_lib.training.ranks import LEAVE
from gan_lib.training.result import TrainingResult
from gan_lib.training.stopwatch import Stopwatch

# The ranks compare losses, and hear of a request to stop, at least this often.
STEPS_BETWEEN_EXCHANGES = 10


def run_epochs(
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
            asked = _run_steps(training, batches, keeper, records, stopwatch, bar)
            if training.steps_done < batches.steps_per_epoch:
                keeper.keep_part(records, training.state())
            else:
                asked = _end_epoch(training, keeper, measuring, records, stopwatch, asked)
            all_records += records
            records = []
        note = stopwatch.note()
        bar.note(note)
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
        note=note,
        asked=asked,
        run=None,
        records=all_records if ranks.rank == 0 else [],
        quality=measuring.lines,
        # A copy is not compiled, if the generator was.
        generator=None if ranks.distributed else copy.deepcopy(training.artist()).cpu().eval(),
    )


def _run_steps(
    training: Training,
    batches: Batches,
    keeper: Keeper,
    records: list[dict[str, Any]],
    stopwatch: Stopwatch,
    bar: ProgressBar,
) -> str:
    """The steps of an epoch that are not done yet; why the ranks are to stop at once, if so."""
    p, ranks, epoch = training.parameters, training.ranks, training.epoch + 1
    losses: list[Tensor] = []
    for batch in stopwatch.over(batches.epoch(epoch, training.steps_done)):
        with stopwatch.during("step"):
            found = training.step(batch)
            losses.append(torch.stack([found[name] for name in LOSSES]) * batch.weight)
        due = training.iteration % p.record_every == 0
        complete = training.steps_done == batches.steps_per_epoch
        asked, now = "", LEAVE.is_set() and not ranks.distributed
        if due or complete or now or len(losses) == STEPS_BETWEEN_EXCHANGES:
            with stopwatch.during("step"):  # here a GPU is waited for
                steps, asked = training.exchange(losses, LEAVE.is_set() or keeper.asked_now)
                if complete or asked:
                    training.finish()
            training.check_losses(steps)
            losses = []
            if due:
                place = {"iteration": training.iteration, "epoch": epoch}
                means = dict(zip(LOSSES, steps[-1], strict=True))
                records.append(place | means | stopwatch.record() | training.memory())
                with stopwatch.during("keeping"):
                    keeper.keep_records(epoch, records)
        bar.update(1, progress_text(records[-1], p.epochs) if records else "")
        if asked:
            return asked
    return ""


def _end_epoch(
    training: Training,
    keeper: Keeper,
    measuring: Measuring,
    records: list[dict[str, Any]],
    stopwatch: Stopwatch,
    asked: str,
) -> str:
    """Bring the ranks together and keep what is due; what somebody asked for, now or before."""
    p, ranks = training.parameters, training.ranks
    training.average_statistics()
    training.epoch += 1
    training.steps_done = 0
    asked = asked or ranks.from_first(keeper.asked)
    ends = training.epoch == p.epochs or asked == "epoch"
    # Who asks for the end now does not wait for a measurement.
    quality = None
    if asked not in ("now", "retire") and measuring.due(ends):
        with stopwatch.during("measuring"):
            quality = measuring.measure()
    best = quality is not None and measuring.is_best()
    last = bool(asked) or training.epoch == p.epochs or best or bool(measuring.enough())
    with stopwatch.during("keeping"):
        if last or training.epoch % p.checkpoint_every == 0:
            training.check_weights()
            ranks.require_equal_weights(training.networks)
        keeper.keep_epoch(training, records, last, quality)
    return asked
