"""A moving average of the generator: what a run draws with, where `ema_images` is given."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gan_lib.gan.drawing import in_parts, latent_vectors, random_labels
from gan_lib.gan.models import Generator

# Images that BatchNorm's statistics are found from. With 2,048 KID is the same within its spread
# (0.573 and 0.569), and where an epoch is short, that took a quarter of the time.
IMAGES = 256


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
        generator: the mean. Its BatchNorm statistics are right after `find_statistics`.
    """

    def __init__(self, generator: Generator, half_life: int) -> None:
        self.half_life = half_life
        self.generator = copy.deepcopy(generator).requires_grad_(False).eval()
        self._to: list[Tensor] = list(self.generator.parameters())
        self._norms = [m for m in self.generator.modules() if isinstance(m, nn.BatchNorm2d)]
        self._found = False

    @torch.no_grad()
    def update(self, generator: Generator, n: int, seen: int) -> None:
        """Take in the generator after a step of `n` images, the last of `seen`."""
        half_life = min(self.half_life, 0.05 * seen)
        now: list[Tensor] = list(generator.parameters())
        torch._foreach_lerp_(self._to, now, 1 - 0.5 ** (n / half_life))
        self._found = False

    @torch.no_grad()
    def find_statistics(self) -> None:
        """Compute BatchNorm's statistics anew, from what the mean draws of the same latent vectors.

        Those of the generator itself belong to other weights: drawn with them, images are further
        from the real ones (Izmailov et al. 2018, arXiv:1803.05407, section 3.2).
        """
        if self._found:
            return
        z = latent_vectors(IMAGES, self.generator.nz, seed=0)
        labels = random_labels(self.generator, IMAGES, seed=0)
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        self.generator.train()
        for part in in_parts(self.generator, z, labels):
            self.generator(*part)
        self.generator.eval()
        self._found = True
