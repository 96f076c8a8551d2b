"""A moving average of the generator: what a run draws with, where `ema_images` is given."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gan_lib.gan.models import Generator


class MovingAverage:
    """The mean of the generator's weights over its last steps.

    The generator of a GAN walks around what it aims at, because what it is told changes with
    every step of the discriminator; the mean of its way lies nearer to the aim (Yazici et al.
    2019, arXiv:1806.04498). Older steps count half as much for each `half_life` images, or for
    each twentieth of all that were seen, so that the first steps are soon forgotten (Karras et
    al. 2020, arXiv:2006.06676, appendix C).

    Args:
        generator: what is averaged.
        half_life: in images.

    Attributes:
        generator: the mean. Its BatchNorm statistics are those of the generator itself, as
            of the last `copy_statistics`.
    """

    def __init__(self, generator: Generator, half_life: int) -> None:
        self.half_life = half_life
        self.generator = copy.deepcopy(generator).requires_grad_(False).eval()
        self._to: list[Tensor] = list(self.generator.parameters())

    @torch.no_grad()
    def update(self, generator: Generator, n: int, seen: int) -> None:
        """Take in the generator after a step of `n` images, the last of `seen`."""
        half_life = min(self.half_life, 0.05 * seen)
        now: list[Tensor] = list(generator.parameters())
        torch._foreach_lerp_(self._to, now, 1 - 0.5 ** (n / half_life))

    @torch.no_grad()
    def copy_statistics(self, generator: Generator) -> None:
        """Take over BatchNorm's statistics, as they are now."""
        for mine, its in zip(self.generator.buffers(), generator.buffers(), strict=True):
            mine.copy_(its)
