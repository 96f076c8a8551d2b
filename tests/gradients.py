"""The gradients of one step, from one rank's share of a batch: for tests that compare ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gan_lib.gan.augmentation import Look
from gan_lib.gan.drawing import latent_vectors
from gan_lib.gan.models import discriminator_of, generator_of
from gan_lib.gan.steps import Lesson, discriminator_step, generator_step
from gan_lib.parameters import TrainingParameters
from gan_lib.training.joint import JointStep
from gan_lib.training.ranks import distribute


def without_batchnorm(module: nn.Module) -> nn.Module:
    """BatchNorm's statistics are those of a rank's own share: without it, ranks must agree."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batchnorm(child)
    return module


def gradients(part: Mapping[str, Any], batch: int) -> list[Tensor]:
    """Of both networks, at one global batch; `part` of a recipe is switched on."""
    told = {"image_size": 16, "channels": 3, "nz": 8, "ngf": 4, "ndf": 4}
    p = TrainingParameters(**told | dict(part))
    alone = not dist.is_initialized()
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    g = without_batchnorm(generator_of(p, {"pug": 3, "collie": 5})).double()
    d = without_batchnorm(discriminator_of(p, 2)).double()
    for module in (g, d) if p.d_norm == "batch" else (g,):
        for weight in module.parameters():
            weight.data.mul_(10)  # without BatchNorm, nothing gets through DCGAN's small weights
    real = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(batch) % 2
    z = latent_vectors(batch, 8, seed=1).double()
    if not alone:
        g, d = distribute(g), distribute(d)
    mine = torch.arange(batch).tensor_split(world_size)[rank]
    lesson = Lesson(
        loss=p.loss,
        real_label=p.real_label,
        r1=p.r1 * p.r1_every,
        labels=labels[mine] if p.conditional else None,
        look=Look(p, 3, slice(int(mine[0]), int(mine[-1]) + 1), batch, rank),
        weight=len(mine) * world_size / batch,
    )
    # A learning rate of 0: the gradients stay, the weights too.
    optimizer_g, optimizer_d = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (g, d))
    step_of_g = JointStep(optimizer_g, g, p.exchange, late=True)
    step_of_d = JointStep(optimizer_d, d, p.exchange)
    fake = g(z[mine], *lesson.given)
    discriminator_step(d, step_of_d, real[mine], fake, lesson)
    found = [p.grad.clone() for p in d.parameters()]
    generator_step(d, step_of_g, real[mine], fake, lesson)
    step_of_g.finish()
    return found + [p.grad.clone() for p in g.parameters()]
