"""One rank's work: the loop around the two steps, from the first epoch or from a checkpoint.

`train_gan` runs alone in one process, or as one rank of many: it asks
torch.distributed which, and knows nothing of Dask.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import gan_lib
from gan_lib.batches import LATENTS, SAMPLES, WEIGHTS, Batch, Batches, stream_seed
from gan_lib.datasets import dataset_images
from gan_lib.errors import DivergenceError, ParameterError
from gan_lib.images import ImageSet, prepare_images
from gan_lib.keeping import Keeper, claim_run
from gan_lib.models import Discriminator, Generator, latent_vectors, render
from gan_lib.parameters import TrainingParameters
from gan_lib.progress import ProgressBar, progress_text
from gan_lib.ranks import Ranks, distribute, pick_device, unwrap, weights_checksum
from gan_lib.results import LOSSES, ResultsHandler, open_run
from gan_lib.steps import autocast, discriminator_step, generator_step


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
    local_rank: int | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a GAN as one rank: the only one, or one of those that torch.distributed knows.

    Args:
        parameters: what to train; a mapping is checked like `TrainingParameters.from_mapping`.
        run: URL of the run directory to write; None writes none.
        images: train on these in place of `parameters.source`: prepared ones, or a torch
            Dataset of (image, label), which reads them anew each time (see `dataset_images`).
        results: also gets parameters.json and the records, e.g. a `DaskResultsHandler`.
        resume: go on from the newest checkpoint in `run`.
        local_rank: which GPU of this machine to take; None asks the environment variable
            LOCAL_RANK, and takes the first GPU if that is not set.
        progress: show a progress bar; None shows one if this is the only rank.

    Raises:
        ParameterError: if the parameters are wrong, or differ between the ranks.
        SourceError: if there are no images.
        RunError: if `run` is taken, or `resume` finds other parameters there.
        DivergenceError: if a loss is no longer a finite number.
    """
    if not isinstance(parameters, TrainingParameters):
        parameters = TrainingParameters.from_mapping(parameters or {})
    ranks = Ranks()
    show = ranks.world_size == 1 if progress is None else progress
    device = pick_device(parameters.device, local_rank)
    if images is None:
        p = parameters
        images = prepare_images(
            p.source, p.image_size, p.channels, p.crop, p.max_images, progress=show
        )
    elif not isinstance(images, ImageSet):
        p = parameters
        images = dataset_images(images, p.image_size, p.channels, p.crop)
    _check_images(images, parameters)
    checksum = images.checksum()
    ranks.require_equal("parameters and images", (parameters.to_dict(), checksum, resume))
    batches = Batches(images, parameters, ranks.rank, ranks.world_size, device)

    training = _Training(parameters, ranks, device)
    if run is not None:
        # Rank 0 decides whether the place is good, and all ranks hear of it.
        ranks.from_first(lambda: claim_run(run, parameters, resume))
        if resume:
            training.load(ranks.from_first(lambda: open_run(run).checkpoint()))
    keeper = Keeper(run, results, parameters) if ranks.rank == 0 else None
    if keeper is not None:
        keeper.keep_parameters(_describe(training, batches, checksum))
    try:
        result = _run_epochs(training, batches, keeper, show)
    except Exception as error:
        if keeper is not None:
            # A full disk, say, must not hide why the run ended.
            with contextlib.suppress(Exception):
                keeper.keep_status("failed", error=f"{type(error).__name__}: {error}")
        raise
    if keeper is not None:
        keeper.keep_status("stopped" if result.stopped else "finished")
    result.run = run
    return result


class _Training:
    """The two networks, their optimisers, and where in the run they are."""

    def __init__(self, parameters: TrainingParameters, ranks: Ranks, device: torch.device) -> None:
        p = self.parameters = parameters
        self.ranks = ranks
        self.device = device
        self.epoch = 0
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

    def _place(self, module: nn.Module) -> nn.Module:
        # channels_last is how the batches lie in memory, and what convolutions run fastest on.
        module = module.to(self.device, memory_format=torch.channels_last)
        return distribute(module) if self.ranks.distributed else module

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of each network; the losses of this rank."""
        p = self.parameters
        seed = stream_seed(p.seed, LATENTS, self.iteration)
        z = latent_vectors(batch.n_total, p.nz, seed)[batch.share].to(self.device)
        with autocast(self.device, p.precision):
            fake = self.g(z)
        losses = discriminator_step(
            self.d,
            self.optimizer_d,
            batch.images,
            fake,
            p.real_label,
            p.fake_label,
            batch.weight,
            p.precision,
        )
        losses |= generator_step(
            self.d, self.optimizer_g, fake, p.real_label, batch.weight, p.precision
        )
        self.iteration += 1
        return losses

    def average_statistics(self) -> None:
        """Give every rank the mean of the ranks' BatchNorm statistics.

        Each rank's running statistics follow its own share of the images; their
        mean follows all of them, and keeps the replicas identical.
        """
        if not self.ranks.distributed:
            return
        for module in (self.g, self.d):
            for buffer in unwrap(module).buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.ranks.mean(buffer))

    def draw(self) -> np.ndarray:
        """The images of the run's own latent vectors: uint8, N x H x W x C."""
        return render(unwrap(self.g), self.sample_latents)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on after the current epoch."""
        return {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "parameters": self.parameters.to_dict(),
            "generator": unwrap(self.g).state_dict(),
            "discriminator": unwrap(self.d).state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.epoch = state["epoch"]
        self.iteration = state["iteration"]
        unwrap(self.g).load_state_dict(state["generator"])
        unwrap(self.d).load_state_dict(state["discriminator"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])


def _run_epochs(
    training: _Training, batches: Batches, keeper: Keeper | None, show: bool
) -> TrainingResult:
    p, ranks = training.parameters, training.ranks
    first_epoch, first_iteration = training.epoch, training.iteration
    todo = max(0, p.epochs - first_epoch)
    n_images = 0
    stopped = False
    all_records: list[dict[str, Any]] = []
    if keeper is not None:
        keeper.keep_status("training")
    started = time.perf_counter()
    stopwatch = _Stopwatch()
    with ProgressBar(todo * batches.steps_per_epoch, "training", "step", show=show) as bar:
        while training.epoch < p.epochs and not stopped:
            epoch = training.epoch + 1
            records: list[dict[str, Any]] = []
            for batch in stopwatch.over(batches.epoch(epoch)):
                losses = training.step(batch)
                n_images += batch.n_total
                if training.iteration % p.record_every == 0:
                    rate = n_images / (time.perf_counter() - started)
                    record = _record(training, epoch, losses, batch.weight, rate)
                    records.append(record | {"data_wait": stopwatch.share()})
                    if keeper is not None:
                        keeper.keep_records(epoch, records)
                bar.update(1, progress_text(records[-1], p.epochs) if records else "")
            training.average_statistics()
            training.epoch = epoch
            all_records += records
            if keeper is not None:
                stopped = keeper.keep_epoch(epoch, records, training.draw, training.state)
            stopped = ranks.from_first(lambda asked=stopped: asked)
    seconds = time.perf_counter() - started
    checksum = weights_checksum(training.g, training.d)
    ranks.require_equal("weights after training", checksum)
    return TrainingResult(
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=str(training.device),
        epochs=training.epoch - first_epoch,
        iterations=training.iteration - first_iteration,
        seconds=seconds,
        images_per_second=n_images / seconds,
        weights_sha256=checksum,
        stopped=stopped and training.epoch < p.epochs,
        run=None,
        records=all_records if ranks.rank == 0 else [],
        generator=None if ranks.distributed else training.g.cpu().eval(),
    )


class _Stopwatch:
    """Which part of the time goes into waiting for the next item."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._since = time.perf_counter()

    def over(self, items: Iterator[Batch]) -> Iterator[Batch]:
        """The same items; the time that each takes to come is counted."""
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def share(self) -> float:
        """The waiting's share of the time since the last call, 0 to 1."""
        now = time.perf_counter()
        share = self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return round(share, 4)


def _record(
    training: _Training, epoch: int, losses: dict[str, Tensor], weight: float, rate: float
) -> dict[str, Any]:
    mine = torch.stack([losses[name] for name in LOSSES]) * weight
    means = dict(zip(LOSSES, training.ranks.mean(mine).tolist(), strict=True))
    for name, value in means.items():
        if not abs(value) < float("inf"):
            # All ranks see the same mean, so all stop here together.
            raise DivergenceError(
                f"{name} is {value} at iteration {training.iteration} of epoch {epoch}: "
                "training has diverged; lower lr_g and lr_d, or use precision float32"
            )
    return {
        "iteration": training.iteration,
        "epoch": epoch,
        **means,
        "images_per_second": round(rate, 2),
        "time": round(time.time(), 3),
    }


def _check_images(images: ImageSet, p: TrainingParameters) -> None:
    wanted = (p.image_size, p.image_size, p.channels)
    if images.pixels.shape[1:] != wanted:
        raise ParameterError(
            f"the images are {images.pixels.shape[1:]}, but image_size and channels "
            f"ask for {wanted}: prepare them with the same values"
        )


def _describe(training: _Training, batches: Batches, images_sha256: str) -> dict[str, Any]:
    images = batches.images
    return {
        "parameters": training.parameters.to_dict(),
        "world_size": training.ranks.world_size,
        "device": str(training.device),
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
