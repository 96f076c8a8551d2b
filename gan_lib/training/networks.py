"""What a rank trains: the two networks, their optimisers, and one step of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn

from gan_lib.base.errors import DivergenceError
from gan_lib.base.seeds import CLASSES, LATENTS, SAMPLES, WEIGHTS, stream_seed
from gan_lib.data.batches import Batch
from gan_lib.data.pixels import to_device
from gan_lib.gan.augmentation import Look
from gan_lib.gan.averaging import MovingAverage
from gan_lib.gan.drawing import generate_images, latent_vectors, random_labels, render
from gan_lib.gan.models import Generator, discriminator_of, generator_of
from gan_lib.gan.rates import rate_factor
from gan_lib.gan.steps import Lesson, autocast, discriminator_step, generator_step
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES
from gan_lib.training.joint import JointStep
from gan_lib.training.ranks import RETIRE, Ranks, distribute, pick_precision

DIVERGED = (
    "training has diverged. The last checkpoint is from before; lower lr_g and lr_d, or use "
    "precision float32, in a new run"
)


class Training:
    """The two networks, their optimisers, and where in the run they are.

    `g` and `d` are `generator` and `discriminator`, with several ranks wrapped in DDP.
    `classes` are the images' classes with the number of images of each.
    """

    def __init__(
        self,
        parameters: TrainingParameters,
        ranks: Ranks,
        device: torch.device,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        p = self.parameters = parameters
        self.ranks = ranks
        self.device = device
        self.precision, self.warning = pick_precision(p.precision, device, ranks)
        self.epoch = 0
        self.steps_done = 0  # of the epoch after that
        self.iteration = 0
        self.seen = 0  # images, by all ranks together
        self.compiled = False
        with torch.random.fork_rng(devices=[]):
            # On the CPU, so that every device starts from the same weights.
            torch.manual_seed(stream_seed(p.seed, WEIGHTS))
            self.generator = generator_of(p, classes)
            self.discriminator = discriminator_of(p, len(classes or ()))
        # Before BatchNorm may become that of all ranks: the mean draws on one rank alone.
        self.average = MovingAverage(self.generator, p.ema_images) if p.ema_images else None
        if self.average:
            self.average.generator.to(device).to(memory_format=torch.channels_last)
        self.g = self._place(self.generator)
        self.d = self._place(self.discriminator)
        if device.type == "cuda":
            # What this process has trained before is not this run's.
            torch.cuda.reset_peak_memory_stats(device)
        # Fused: one pass over weights, gradients and moments, where there were a dozen.
        adam = partial(torch.optim.Adam, betas=(p.beta1, p.beta2), fused=True)
        self.optimizer_g = adam(self.g.parameters(), lr=p.lr_g)
        self.optimizer_d = adam(self.d.parameters(), lr=p.lr_d)
        # Among several ranks, these two exchange gradients.
        self.step_of_g = JointStep(self.optimizer_g, self.g, p.exchange, late=True)
        self.step_of_d = JointStep(self.optimizer_d, self.d, p.exchange)
        self.unfinished = 0  # images of the last step, if the generator has yet to take it
        self.sample_latents = latent_vectors(p.n_samples, p.nz, stream_seed(p.seed, SAMPLES))
        self.sample_labels = random_labels(
            self.generator, p.n_samples, stream_seed(p.seed, CLASSES)
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both, by name, without their DDP wrappers."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def _place(self, module: nn.Module) -> nn.Module:
        # channels_last is how the batches lie in memory, and what convolutions run fastest on.
        module = module.to(self.device).to(memory_format=torch.channels_last)
        if self.parameters.sync_norm:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return distribute(module) if self.ranks.distributed else module

    def compile(self) -> None:
        """From now on, train with code that torch writes for these networks at the first step."""
        # Whatever was compiled in this process before counts against a limit, beyond which torch
        # silently compiles no more; and a step looks at D in three ways, each at up to three sizes.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 16
        for network in self.networks.values():
            # In place, and inside of DDP: in checkpoints everything keeps its name, and D is
            # compiled too where it is called without its wrapper.
            network.compile(dynamic=False)
        self.compiled = True

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of each network; the losses of this rank.

        Among several ranks, the generator's weights change in the next step, or in `finish`.
        """
        lesson = self.lesson(batch)
        self._set_rate(self.optimizer_d, self.parameters.lr_d)
        # Called when the discriminator has looked at the real images.
        make_fake = cache(partial(self.make_fake, batch, lesson))
        losses = discriminator_step(self.d, self.step_of_d, batch.images, make_fake, lesson)
        losses |= generator_step(self.d, self.step_of_g, batch.images, make_fake(), lesson)
        self.iteration += 1
        self.steps_done += 1
        self.seen += batch.n_total
        self.unfinished = batch.n_total
        if not self.ranks.distributed:
            self.finish()
        return losses

    def finish(self) -> None:
        """Complete the last step, whose gradients may still be on their way."""
        if self.unfinished:
            self.step_of_g.finish()
            if self.average:
                self.average.update(self.generator, self.unfinished, self.seen)
            self.unfinished = 0

    def make_fake(self, batch: Batch, lesson: Lesson) -> Tensor:
        """The generated images of a step: for this rank, as many as it has real ones."""
        self.finish()
        p = self.parameters
        self._set_rate(self.optimizer_g, p.lr_g)
        seed = stream_seed(p.seed, LATENTS, self.iteration)
        z = to_device(latent_vectors(batch.n_total, p.nz, seed)[batch.share], self.device)
        with autocast(self.device, self.precision):
            # Of the same classes as the real images beside them.
            fake: Tensor = self.g(z, *lesson.given)
        # As real images are, or in bfloat16 D would be compiled once more, for these.
        return fake.float() if self.compiled else fake

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        factor = rate_factor(self.parameters, self.seen)
        for group in optimizer.param_groups:
            group["lr"] = factor * rate

    def lesson(self, batch: Batch) -> Lesson:
        """What the next step teaches by."""
        p = self.parameters
        penalised = p.r1 > 0 and self.iteration % p.r1_every == 0
        return Lesson(
            loss=p.loss,
            real_label=p.real_label,
            fake_label=p.fake_label,
            r1=p.r1 * p.r1_every if penalised else 0.0,
            labels=batch.labels if p.conditional else None,
            look=Look(p, self.iteration, batch.share, batch.n_total, self.ranks.rank, self.seen),
            weight=batch.weight,
            precision=self.precision,
        )

    def exchange(self, losses: list[Tensor], stop: bool) -> tuple[list[list[float]], str]:
        """The means of some steps' losses over the ranks, and what any rank wishes.

        That is "now" if one wishes to `stop`, "retire" if the worker of one is to end, or empty.
        """
        wishes = torch.zeros_like(losses[0])
        wishes[0], wishes[1] = float(stop), float(RETIRE.is_set())
        # As the discriminator's gradients go, of which none are on their way between two steps.
        *means, (stops, retires, *_) = self.step_of_d.mean(torch.stack([*losses, wishes])).tolist()
        return means, "now" if stops else "retire" if retires else ""

    def average_statistics(self) -> None:
        """Give every rank the mean of the ranks' BatchNorm statistics.

        Each rank's running statistics follow its own share of the images; their
        mean follows all of them, and keeps the replicas identical.
        """
        if self.ranks.distributed:
            buffers = [buffer for _, buffer in self._statistics()]
            # In one exchange: each would be a meeting of all ranks.
            mean = self.step_of_d.mean(torch.cat([buffer.flatten() for buffer in buffers]))
            parts = mean.split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def artist(self) -> Generator:
        """The generator to draw with: the moving average, if there is one."""
        if self.average is None:
            return self.generator
        self.average.find_statistics()
        return self.average.generator

    def draw(self) -> np.ndarray:
        """The images of the run's own latent vectors: uint8, N x H x W x C."""
        with torch.compiler.set_stance("force_eager"):
            return render(self.artist(), self.sample_latents, self.sample_labels)

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

    def memory(self) -> dict[str, float]:
        """For a record: gigabytes of a GPU's memory, at their most so far; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {"device_memory_gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)}

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
            "seen": self.seen,
            "compiled": self.compiled,
            "parameters": self.parameters.to_dict(),
            "classes": self.generator.classes,
            **({"average": self.artist().state_dict()} if self.average else {}),
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
        self.seen = state.get("seen", 0)
        for name, module in self.networks.items():
            module.load_state_dict(state[name])
        if self.average:
            self.average.generator.load_state_dict(state["average"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        by_rank = state.get("statistics", [])
        for name, buffer in self._statistics() if by_rank else ():
            values = [statistics[name] for statistics in by_rank]
            same = len(values) == self.ranks.world_size
            buffer.copy_(values[self.ranks.rank] if same else torch.stack(values).mean(0))

    def generate(self, n: int, seed: int, part: slice) -> np.ndarray:
        """A part of `n` new images, of which each rank may draw another: uint8, as `draw`."""
        # Compiled, each new number of images would cost more than it gains.
        with torch.compiler.set_stance("force_eager"):
            return generate_images(self.artist(), n, seed, part=part)

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        for network, module in self.networks.items():
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    yield f"{network}.{name}", buffer
