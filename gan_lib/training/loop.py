"""One rank's work: the loop around the two steps, from the first epoch or from a checkpoint.

`train_gan` runs alone in one process, or as one rank of many: it asks
torch.distributed which, and knows nothing of Dask.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import gan_lib
from gan_lib.base.errors import DivergenceError
from gan_lib.base.interrupts import interruptible
from gan_lib.base.progress import ProgressBar, progress_text
from gan_lib.base.seeds import LATENTS, SAMPLES, WEIGHTS, stream_seed
from gan_lib.data.batches import Batch, Batches, check_images
from gan_lib.data.datasets import dataset_images
from gan_lib.data.images import ImageSet, prepare_images
from gan_lib.gan.models import Discriminator, Generator, latent_vectors, render
from gan_lib.gan.steps import autocast, discriminator_step, generator_step, unwrap
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES
from gan_lib.results.writing import ResultsHandler
from gan_lib.training.keeping import Keeper, claim_run
from gan_lib.training.ranks import (
    ATTEMPT_VARIABLE,
    LEAVE,
    Ranks,
    distribute,
    pick_device,
    pick_precision,
    restarts_before,
    weights_checksum,
)
from gan_lib.training.stopwatch import Stopwatch


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
        asked: for what: "epoch", "now" or "regroup" (to go on with more ranks).
        run: URL of the run directory, if one was written.
        records: one dictionary per recorded iteration (rank 0 only).
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
    asked: str
    run: str | None
    records: list[dict[str, Any]] = field(repr=False, default_factory=list)
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
    p = parameters
    if images is None:
        images = prepare_images(
            p.source, p.image_size, p.channels, p.crop, p.max_images, progress=show
        )
    elif not isinstance(images, ImageSet):
        images = dataset_images(images, p.image_size, p.channels, p.crop)
    check_images(images, parameters, resume)
    checksum = images.checksum()
    ranks.require_equal("parameters and images", (parameters.to_dict(), checksum, resume))
    batches = Batches(images, parameters, ranks.rank, ranks.world_size, device)

    training = Training(parameters, ranks, device)
    attempt = os.environ.get(ATTEMPT_VARIABLE, "")
    with interruptible(LEAVE):
        if run is not None:
            # Rank 0 decides whether the place is good, and all ranks hear of it.
            ranks.from_first(
                lambda: claim_run(run, parameters, images, resume, new_images, attempt)
            )
        keeper = Keeper(run, results, parameters, attempt) if ranks.rank == 0 else None
        try:
            records: list[dict[str, Any]] = []
            damaged: list[str] = []
            if run is not None and resume:
                # Nobody is there to decide: a job that restarts begins anew if it has to.
                start_over = restarts_before(attempt) > 0
                state, records, damaged = ranks.from_first(lambda: keeper.take_up(start_over))
                if state:
                    training.load(state)
            if keeper is not None:
                info = _describe(training, batches, checksum)
                info["resumed"] = {"epoch": training.epoch, "damaged": damaged} if resume else None
                keeper.keep_parameters(info)
            result = _run_epochs(training, batches, keeper, records, show)
            if keeper is not None:
                ended = "stopped" if result.stopped else "finished"
                if result.stopped and result.asked == "regroup":
                    ended = "waiting"
                keeper.close(ended)
        except BaseException as error:
            if keeper is not None:
                keeper.fail(error)
            raise
    result.run = run
    return result


# The ranks compare losses, and hear of a request to stop, at least this often.
STEPS_BETWEEN_EXCHANGES = 10
_DIVERGED = (
    "training has diverged. The last checkpoint is from before; lower lr_g and lr_d, or use "
    "precision float32, in a new run"
)


class Training:
    """The two networks, their optimisers, and where in the run they are."""

    def __init__(self, parameters: TrainingParameters, ranks: Ranks, device: torch.device) -> None:
        p = self.parameters = parameters
        self.ranks = ranks
        self.device = device
        self.precision, self.warning = pick_precision(p.precision, device, ranks)
        self.epoch = 0
        self.steps_done = 0  # of the epoch after that
        self.iteration = 0
        with torch.random.fork_rng(devices=[]):
            # On the CPU, so that every device starts from the same weights.
            torch.manual_seed(stream_seed(p.seed, WEIGHTS))
            g = Generator(p.image_size, p.channels, p.nz, p.ngf, p.normalisation)
            d = Discriminator(p.image_size, p.channels, p.ndf)
        self.g = self._place(g)
        self.d = self._place(d)
        betas = (p.beta1, p.beta2)
        self.optimizer_g = torch.optim.Adam(self.g.parameters(), lr=p.lr_g, betas=betas)
        self.optimizer_d = torch.optim.Adam(self.d.parameters(), lr=p.lr_d, betas=betas)
        self.sample_latents = latent_vectors(p.n_samples, p.nz, stream_seed(p.seed, SAMPLES))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both, by name, without their DDP wrappers."""
        return {"generator": unwrap(self.g), "discriminator": unwrap(self.d)}

    def _place(self, module: nn.Module) -> nn.Module:
        # channels_last is how the batches lie in memory, and what convolutions run fastest on.
        module = module.to(self.device, memory_format=torch.channels_last)
        return distribute(module) if self.ranks.distributed else module

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of each network; the losses of this rank."""
        p = self.parameters
        seed = stream_seed(p.seed, LATENTS, self.iteration)
        z = latent_vectors(batch.n_total, p.nz, seed)[batch.share].to(self.device)
        with autocast(self.device, self.precision):
            fake = self.g(z)
        losses = discriminator_step(
            self.d,
            self.optimizer_d,
            batch.images,
            fake,
            p.real_label,
            p.fake_label,
            batch.weight,
            self.precision,
        )
        losses |= generator_step(
            self.d, self.optimizer_g, fake, p.real_label, batch.weight, self.precision
        )
        self.iteration += 1
        self.steps_done += 1
        return losses

    def average_statistics(self) -> None:
        """Give every rank the mean of the ranks' BatchNorm statistics.

        Each rank's running statistics follow its own share of the images; their
        mean follows all of them, and keeps the replicas identical.
        """
        if self.ranks.distributed:
            for _, buffer in self._statistics():
                buffer.copy_(self.ranks.mean(buffer))

    def draw(self) -> np.ndarray:
        """The images of the run's own latent vectors: uint8, N x H x W x C."""
        return render(unwrap(self.g), self.sample_latents)

    def exchange(self, losses: list[Tensor], leave: bool) -> tuple[list[dict[str, float]], bool]:
        """Compare notes between the ranks.

        Args:
            losses: of this rank's last steps, each weighted, in the order of LOSSES.
            leave: whether this rank knows that all should stop at once.

        Returns:
            The means over the ranks, of each step; and whether any rank wants to leave.

        Raises:
            DivergenceError: on all ranks together, naming the first step that has no finite loss.
        """
        mine = torch.stack([*losses, torch.full_like(losses[0], float(leave))])
        *means, wishes = self.ranks.mean(mine).tolist()
        steps = [dict(zip(LOSSES, values, strict=True)) for values in means]
        for iteration, step in enumerate(steps, self.iteration - len(steps) + 1):
            for name, value in step.items():
                if not math.isfinite(value):
                    raise DivergenceError(
                        f"{name} is {value} at iteration {iteration} of epoch {self.epoch + 1}: "
                        f"{_DIVERGED}"
                    )
        return steps, wishes[0] > 0

    def check_weights(self) -> None:
        """Raise DivergenceError if a weight is not finite: a finite loss may come before it."""
        for network, module in self.networks.items():
            for name, value in module.state_dict().items():
                if not torch.isfinite(value).all():
                    raise DivergenceError(
                        f"{name} of the {network} is no longer finite after iteration "
                        f"{self.iteration}: {_DIVERGED}"
                    )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly here; every rank has to ask for it together.

        There is no state of random generators: every draw is a function of the seed and of
        where in the run it is made (see `gan_lib.data.batches`).
        """
        # Between the ends of two epochs, each rank has BatchNorm statistics of its own.
        own = dict(self._statistics()) if self.steps_done else {}
        return {
            "epoch": self.epoch,
            "step": self.steps_done,
            "iteration": self.iteration,
            "parameters": self.parameters.to_dict(),
            **{name: module.state_dict() for name, module in self.networks.items()},
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "statistics": self.ranks.gather({k: v.cpu() for k, v in own.items()}) if own else [],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.epoch = state["epoch"]
        self.steps_done = state.get("step", 0)
        self.iteration = state["iteration"]
        for name, module in self.networks.items():
            module.load_state_dict(state[name])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        by_rank = state.get("statistics", [])
        for name, buffer in self._statistics() if by_rank else ():
            values = [statistics[name] for statistics in by_rank]
            same = len(values) == self.ranks.world_size
            buffer.copy_(values[self.ranks.rank] if same else torch.stack(values).mean(0))

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        for network, module in self.networks.items():
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    yield f"{network}.{name}", buffer


def _run_epochs(
    training: Training,
    batches: Batches,
    keeper: Keeper | None,
    records: list[dict[str, Any]],
    show: bool,
) -> TrainingResult:
    """Train until the last epoch, or until somebody asks to stop.

    `records` are those of the epoch that the training is inside of.
    """
    p, ranks = training.parameters, training.ranks
    first_epoch, first_iteration = training.epoch, training.iteration
    todo = max(0, (p.epochs - first_epoch) * batches.steps_per_epoch - training.steps_done)
    asked = ""
    all_records: list[dict[str, Any]] = []
    if keeper is not None:
        keeper.keep_status("training")
    stopwatch = Stopwatch()
    with ProgressBar(todo, "training", "step", show=show, forecast=True) as bar:
        while training.epoch < p.epochs and not asked:
            leave = _run_steps(training, batches, keeper, records, stopwatch, bar)
            if training.steps_done < batches.steps_per_epoch:
                state = training.state()
                if keeper is not None:
                    keeper.keep_part(training.epoch + 1, records, state)
                asked = "now"
            else:
                asked = _end_epoch(training, keeper, records, leave)
            all_records += records
            records = []
    return TrainingResult(
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=str(training.device),
        epochs=training.epoch - first_epoch,
        iterations=training.iteration - first_iteration,
        seconds=stopwatch.seconds(),
        images_per_second=stopwatch.rate(),
        weights_sha256=weights_checksum(training.g, training.d),
        stopped=bool(asked) and training.epoch < p.epochs,
        asked=asked,
        run=None,
        records=all_records if ranks.rank == 0 else [],
        generator=None if ranks.distributed else training.g.cpu().eval(),
    )


def _run_steps(
    training: Training,
    batches: Batches,
    keeper: Keeper | None,
    records: list[dict[str, Any]],
    stopwatch: Stopwatch,
    bar: ProgressBar,
) -> bool:
    """The steps of an epoch that are not done yet; True if the ranks are to stop at once."""
    p, alone = training.parameters, not training.ranks.distributed
    losses: list[Tensor] = []
    for batch in stopwatch.over(batches.epoch(training.epoch + 1, training.steps_done)):
        found = training.step(batch)
        losses.append(torch.stack([found[name] for name in LOSSES]) * batch.weight)
        due = training.iteration % p.record_every == 0
        complete = training.steps_done == batches.steps_per_epoch
        leave, now = False, alone and LEAVE.is_set()
        if due or complete or now or len(losses) == STEPS_BETWEEN_EXCHANGES:
            wish = LEAVE.is_set() or (keeper is not None and keeper.asked_now)
            steps, leave = training.exchange(losses, wish)
            losses = []
            if due:
                record = {"iteration": training.iteration, "epoch": training.epoch + 1}
                record |= steps[-1] | stopwatch.record()
                records.append(record)
                if keeper is not None:
                    keeper.keep_records(training.epoch + 1, records)
        bar.update(1, progress_text(records[-1], p.epochs) if records else "")
        if leave:
            return True
    return False


def _end_epoch(
    training: Training, keeper: Keeper | None, records: list[dict[str, Any]], leave: bool
) -> str:
    """Bring the ranks together and keep what is due; what somebody asked for."""
    p, ranks = training.parameters, training.ranks
    training.average_statistics()
    training.epoch += 1
    training.steps_done = 0
    asked = "now" if leave else ranks.from_first(lambda: keeper.asked() if keeper else "")
    last = bool(asked) or training.epoch == p.epochs
    if last or training.epoch % p.checkpoint_every == 0:
        training.check_weights()
        ranks.require_equal_weights(training.networks)
    if keeper is not None:
        keeper.keep_epoch(training.epoch, records, training.draw, training.state, last)
    return asked


def _describe(training: Training, batches: Batches, images_sha256: str) -> dict[str, Any]:
    images = batches.images
    return {
        "parameters": training.parameters.to_dict(),
        "world_size": training.ranks.world_size,
        "device": str(training.device),
        "precision_taken": training.precision,
        "warning": training.warning,
        "device_name": torch.cuda.get_device_name(training.device)
        if training.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "backend": dist.get_backend() if training.ranks.distributed else None,
        "images": len(images),
        "classes": len(images.classes),
        "skipped": len(images.skipped),
        "images_sha256": images_sha256,
        "steps_per_epoch": batches.steps_per_epoch,
        "versions": {
            "gan_lib": gan_lib.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "dask")},
        },
    }
