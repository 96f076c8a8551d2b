"""The GAN's training step: what the discriminator learns, and then the generator.

Both work on any modules, alone or wrapped in DDP, and know nothing of runs or clusters.
"""

from __future__ import annotations

import contextlib

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817


def gan_loss(scores: Tensor, label: float) -> Tensor:
    """Binary cross-entropy of the discriminator's scores against one label.

    With label 1 for real and 0 for fake this is Goodfellow et al. 2014
    (arXiv:1406.2661), equation 1, with the generator's loss in the form that
    does not saturate (section 3).

    Args:
        scores: logits, n.
        label: from 0 to 1.
    """
    return binary_cross_entropy_with_logits(scores.float(), torch.full_like(scores.float(), label))


def discriminator_step(
    d: nn.Module,
    optimizer_d: torch.optim.Optimizer,
    real: Tensor,
    fake: Tensor,
    real_label: float = 0.5,
    fake_label: float = 0.0,
    weight: float = 1.0,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """Teach the discriminator to tell this rank's real images from its generated ones.

    Args:
        d: the discriminator, alone or wrapped in DDP.
        optimizer_d: its optimiser; one step is taken.
        real: n x C x H x W.
        fake: n x C x H x W; the generator learns nothing from this step.
        real_label: target for real images.
        fake_label: target for generated images.
        weight: of this rank's loss in the mean over ranks, see `Batch`.
        precision: "float32" or "bfloat16".

    Returns:
        The losses "loss_d_real", "loss_d_fake" and their sum "loss_d", each a scalar.
    """
    d.requires_grad_(True)
    optimizer_d.zero_grad(set_to_none=True)
    # Real and fake pass separately, because BatchNorm would mix their statistics in one
    # pass; and each has its backward before the other's forward: with two backward passes
    # after two forward passes, DDP would exchange one of them and not the other, silently.
    # The gradients add up, so only the second half needs the exchange between ranks.
    with d.no_sync() if isinstance(d, DDP) else contextlib.nullcontext():
        with autocast(real.device, precision):
            loss_d_real = gan_loss(d(real), real_label)
        (weight * loss_d_real).backward()
    with autocast(real.device, precision):
        loss_d_fake = gan_loss(d(fake.detach()), fake_label)
    (weight * loss_d_fake).backward()
    optimizer_d.step()
    real_part, fake_part = loss_d_real.detach(), loss_d_fake.detach()
    return {"loss_d_real": real_part, "loss_d_fake": fake_part, "loss_d": real_part + fake_part}


def generator_step(
    d: nn.Module,
    optimizer_g: torch.optim.Optimizer,
    fake: Tensor,
    real_label: float = 0.5,
    weight: float = 1.0,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """Teach the generator to make images that the discriminator takes for real.

    Args:
        d: the discriminator, alone or wrapped in DDP; it learns nothing from this step.
        optimizer_g: the generator's optimiser; one step is taken.
        fake: n x C x H x W, as the generator (alone or in DDP) returned them.
        real_label: target for the generated images.
        weight: of this rank's loss in the mean over ranks, see `Batch`.
        precision: "float32" or "bfloat16".

    Returns:
        The loss "loss_g", a scalar.
    """
    optimizer_g.zero_grad(set_to_none=True)
    # The gradient flows through D to the images, but D's own weights need none: frozen
    # and without its DDP wrapper it computes none and exchanges none.
    judge = unwrap(d).requires_grad_(False)
    with autocast(fake.device, precision):
        loss_g = gan_loss(judge(fake), real_label)
    (weight * loss_g).backward()
    optimizer_g.step()
    return {"loss_g": loss_g.detach()}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision where `precision` is "bfloat16", on the device's type."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, without its DDP wrapper."""
    return module.module if isinstance(module, DDP) else module
