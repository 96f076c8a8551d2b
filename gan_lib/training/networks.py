"""What a rank trains: the two networks, their optimisers, and one step of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gan_lib.base.errors import DivergenceError
from gan_lib.base.seeds import LATENTS, SAMPLES, WEIGHTS, stream_seed
from gan_lib.data.batches import Batch
from gan_lib.gan.models import Discriminator, generator_of, latent_vectors, render
from gan_lib.gan.steps import autocast, discriminator_step, generator_step
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES
from gan_lib.training.ranks import Ranks, distribute, pick_precision

DIVERGED = (
    "training has diverged. The last checkpoint is from before; lower lr_g and lr_d, or use "
    "precision float32, in a new run"
)


class Training:
    """The two networks, their optimisers, and where in the run they are.

    `g` and `d` are `generator` and `discriminator`, with several ranks wrapped in DDP.
    """

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
            self.generator = generator_of(p)
            self.discriminator = Discriminator(p.image_size, p.channels, p.ndf)
        self.g = self._place(self.generator)
        self.d = self._place(self.discriminator)
        betas = (p.beta1, p.beta2)
        self.optimizer_g = torch.optim.Adam(self.g.parameters(), lr=p.lr_g, betas=betas)
        self.optimizer_d = torch.optim.Adam(self.d.parameters(), lr=p.lr_d, betas=betas)
        self.sample_latents = latent_vectors(p.n_samples, p.nz, stream_seed(p.seed, SAMPLES))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both, by name, without their DDP wrappers."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def _place(self, module: nn.Module) -> nn.Module:
        # channels_last is how the batches lie in memory, and what convolutions run fastest on.
        module = module.to(self.device).to(memory_format=torch.channels_last)
        return distribute(module) if self.ranks.distributed else module

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of each network; the losses of this rank."""
        p = self.parameters
        seed = stream_seed(p.seed, LATENTS, self.iteration)
        z = latent_vectors(batch.n_total, p.nz, seed)[batch.share].to(self.device)
        with autocast(self.device, self.precision):
            fake = self.g(z)
        how = batch.weight, self.precision
        losses = discriminator_step(
            self.d, self.optimizer_d, batch.images, fake, p.real_label, p.fake_label, *how
        )
        losses |= generator_step(self.d, self.optimizer_g, fake, p.real_label, *how)
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
        return render(self.generator, self.sample_latents)

    def check_losses(self, steps: list[list[float]]) -> None:
        """Raise DivergenceError for the first of the last `steps` that has no finite loss.

        Its losses are the means over the ranks, in the order of LOSSES: so all ranks raise it.
        """
        for iteration, losses in enumerate(steps, self.iteration - len(steps) + 1):
            for name, value in zip(LOSSES, losses, strict=True):
                if not math.isfinite(value):
                    raise DivergenceError(
                        f"{name} is {value} at iteration {iteration} of epoch {self.epoch + 1}: "
                        f"{DIVERGED}"
                    )

    def check_weights(self) -> None:
        """Raise DivergenceError if a weight is not finite: a finite loss may come before it."""
        for network, module in self.networks.items():
            for name, value in module.state_dict().items():
                if not torch.isfinite(value).all():
                    raise DivergenceError(
                        f"{name} of the {network} is no longer finite after iteration "
                        f"{self.iteration}: {DIVERGED}"
                    )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly here.

        Inside an epoch all ranks have to ask for it together, at the end of one any rank may.
        There is no state of random generators: every draw is a function of the seed and of
        where in the run it is made (see `gan_lib.data.batches`).
        """
        # Inside an epoch, each rank has BatchNorm statistics of its own.
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
