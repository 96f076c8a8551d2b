"""The GAN's training step: what the discriminator learns, and then the generator.

Both work on any modules, alone or wrapped in DDP, and know nothing of runs or clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from gan_lib.gan.losses import (
    gan_loss,
    loss_of_generator,
    loss_of_pairs,
    loss_on_fake,
    loss_on_real,
)

# Which images the discriminator looks at, one number for each time that it does in a step.
REAL, FAKE, FAKE_AGAIN, REAL_AGAIN = range(4)


class Optimizer(Protocol):
    """What the two steps need of an optimiser: all of torch's have it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last gradients."""

    def step(self) -> Any:
        """Change the weights."""


def as_they_are(images: Tensor, turn: int) -> Tensor:
    """A look at images that changes nothing."""
    return images


@dataclass(frozen=True)
class Lesson:
    """What one step teaches by, on this rank.

    Attributes:
        loss: "bce", "hinge" or "relativistic", see `gan_lib.gan.losses`.
        real_label: target for real images, and for the generator's.
        fake_label: target for generated images.
        r1: weight of the gradient penalty in this step.
        labels: int64, n, the classes of the images, if the networks are told them.
        look: how the discriminator sees images, see `gan_lib.gan.augmentation.Look`.
        weight: of this rank's loss in the mean over ranks, see `Batch`.
        precision: "float32" or "bfloat16".
    """

    loss: str = "bce"
    real_label: float = 0.5
    fake_label: float = 0.0
    r1: float = 0.0
    labels: Tensor | None = None
    look: Callable[[Tensor, int], Tensor] = as_they_are
    weight: float = 1.0
    precision: str = "float32"

    def scores(self, d: nn.Module, images: Tensor, turn: int) -> Tensor:
        """What the discriminator says of images, n."""
        with autocast(images.device, self.precision):
            scores: Tensor = d(self.look(images, turn), *self.given)
        return scores

    @property
    def given(self) -> tuple[Tensor, ...]:
        """What the networks are told beside images or latent vectors."""
        return () if self.labels is None else (self.labels,)


def discriminator_step(
    d: nn.Module,
    optimizer_d: Optimizer,
    real: Tensor,
    fake: Tensor | Callable[[], Tensor],
    lesson: Lesson,
) -> dict[str, Tensor]:
    """Teach the discriminator to tell this rank's real images from its generated ones.

    Args:
        d: the discriminator, alone or wrapped in DDP.
        optimizer_d: its optimiser; one step is taken.
        real: n x C x H x W.
        fake: n x C x H x W; the generator learns nothing from this step. Or what makes them, the
            same each time, which is called as late as can be.
        lesson: what it is told.

    Returns:
        The losses "loss_d_real", "loss_d_fake" and "loss_d", each a scalar. "loss_d" is their
        sum, but for the relativistic loss, which has no parts: there the first two are the
        binary cross-entropies of the same scores, against 1 and 0.
    """
    d.requires_grad_(True)
    optimizer_d.zero_grad(set_to_none=True)

    def generated() -> Tensor:
        return (fake() if callable(fake) else fake).detach()

    # Gradients add up, so only the last backward needs the exchange between ranks.
    if lesson.r1 > 0:
        with without_exchange(d):
            penalty = r1_penalty(d, real, lesson, REAL)
            if lesson.loss == "relativistic":
                penalty = penalty + r1_penalty(d, generated(), lesson, FAKE)
            (lesson.weight * lesson.r1 / 2 * penalty).backward()
    if lesson.loss == "relativistic":
        on_real, on_fake = lesson.scores(d, real, REAL), lesson.scores(d, generated(), FAKE)
        loss_d = loss_of_pairs(on_real, on_fake)
        (lesson.weight * loss_d).backward()
        loss_d_real, loss_d_fake = gan_loss(on_real, 1.0), gan_loss(on_fake, 0.0)
    else:
        # Real and fake pass separately, because BatchNorm would mix their statistics in one
        # pass; and each has its backward before the other's forward: with two backward passes
        # after two forward passes, DDP would exchange one of them and not the other, silently.
        with without_exchange(d):
            scores = lesson.scores(d, real, REAL)
            loss_d_real = loss_on_real(lesson.loss, scores, lesson.real_label)
            (lesson.weight * loss_d_real).backward()
        scores = lesson.scores(d, generated(), FAKE)
        loss_d_fake = loss_on_fake(lesson.loss, scores, lesson.fake_label)
        (lesson.weight * loss_d_fake).backward()
        loss_d = loss_d_real + loss_d_fake
    optimizer_d.step()
    losses = {"loss_d_real": loss_d_real, "loss_d_fake": loss_d_fake, "loss_d": loss_d}
    return {name: loss.detach() for name, loss in losses.items()}


def generator_step(
    d: nn.Module, optimizer_g: Optimizer, real: Tensor, fake: Tensor, lesson: Lesson
) -> dict[str, Tensor]:
    """Teach the generator to make images that the discriminator takes for real.

    Args:
        d: the discriminator, alone or wrapped in DDP; it learns nothing from this step.
        optimizer_g: the generator's optimiser; one step is taken.
        real: n x C x H x W; looked at only by the relativistic loss.
        fake: n x C x H x W, as the generator (alone or in DDP) returned them.
        lesson: what it is told.

    Returns:
        The loss "loss_g", a scalar.
    """
    optimizer_g.zero_grad(set_to_none=True)
    # The gradient flows through D to the images, but D's own weights need none: frozen
    # and without its DDP wrapper it computes none and exchanges none.
    judge = unwrap(d).requires_grad_(False)
    scores = lesson.scores(judge, fake, FAKE_AGAIN)
    if lesson.loss == "relativistic":
        loss_g = loss_of_pairs(scores, lesson.scores(judge, real, REAL_AGAIN))
    else:
        loss_g = loss_of_generator(lesson.loss, scores, lesson.real_label)
    (lesson.weight * loss_g).backward()
    optimizer_g.step()
    return {"loss_g": loss_g.detach()}


def r1_penalty(d: nn.Module, images: Tensor, lesson: Lesson, turn: int) -> Tensor:
    """Mean squared length of the scores' gradient with respect to the images.

    Of real images this is R1 of Mescheder et al. 2018, arXiv:1801.04406, equation 9 without its
    factor; of generated ones R2. In float32, because it is differentiated once more.
    """
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
    with autocast(images.device, "float32"):
        scores = unwrap(d)(lesson.look(images, turn), *lesson.given)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def without_exchange(d: nn.Module) -> contextlib.AbstractContextManager[None]:
    """In here, `backward` adds up gradients on this rank alone."""
    return d.no_sync() if isinstance(d, DDP) else contextlib.nullcontext()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision where `precision` is "bfloat16", on the device's type."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, without its DDP wrapper."""
    return module.module if isinstance(module, DDP) else module
