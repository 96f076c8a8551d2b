"""What is changed in an image before the discriminator sees it, real or generated alike.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training" (DiffAugment),
arXiv:2006.10738, section 3. Changes to the real images alone are learnt by the generator as
if they were part of them. Made to both, in both steps, and so that the gradient passes through
them, they only take from the discriminator what it could know by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gan_lib.base.seeds import AUGMENTATION, COLOURS, PIXEL_NOISE, stream_seed
from gan_lib.data.pixels import jitter_colours, to_device
from gan_lib.parameters import TrainingParameters


@dataclass(frozen=True)
class Look:
    """How this rank's discriminator sees images in one step: `augment` and `augment_late`,
    `color_jitter`, `noise`.

    What is drawn is a function of the seed, the iteration and the turn, and is drawn for the
    whole batch before each rank takes its share (the noise, which is large, for each rank).

    Attributes:
        parameters: those three, the seed, and how pixels are normalised.
        iteration: the step's number in the run.
        share: the part `start:stop` of the whole batch that this rank's images are.
        n_total: images of this step on all ranks together.
        rank: of this process.
        seen: images before this step, which decides how much of `augment` has begun.
    """

    parameters: TrainingParameters
    iteration: int
    share: slice
    n_total: int
    rank: int = 0
    seen: int = 0

    def __call__(self, images: Tensor, turn: int) -> Tensor:
        """The images of one turn of the step (each has changes of its own), n x C x H x W."""
        p = self.parameters
        if changes := p.changes(self.seen):
            seed = stream_seed(p.seed, AUGMENTATION, self.iteration, turn)
            numbers = numbers_for(changes, self.n_total, seed)[self.share]
            images = augment(images, changes, numbers)
        if p.color_jitter > 0:
            seed = stream_seed(p.seed, COLOURS, self.iteration, turn)
            u = numbers_for(("color",), self.n_total, seed)[self.share]
            u = to_device(u, images.device).to(images.dtype)
            images = jitter_colours(images, 1 + p.color_jitter * (2 * u - 1), *p.normalisation)
        if p.noise > 0:
            generator = torch.Generator(images.device)
            generator.manual_seed(stream_seed(p.seed, PIXEL_NOISE, self.iteration, turn, self.rank))
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            mean, std = p.normalisation
            black, white = -mean / std, (1 - mean) / std
            images = images.add(noise, alpha=p.noise * (white - black) / 2).clamp(black, white)
        return images


def numbers_for(policy: Sequence[str], n: int, seed: int) -> Tensor:
    """Random numbers between 0 and 1 for `n` images, n x (how many the policy takes)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, sum(_CHANGES[name][0] for name in policy), generator=generator)


def augment(images: Tensor, policy: Sequence[str], numbers: Tensor) -> Tensor:
    """Change each image in its own way; gradients pass through.

    Args:
        images: n x C x H x W, 0 in the middle of black and white.
        policy: what to change: "translation", "cutout", "color".
        numbers: n x k, see `numbers_for`: equal numbers, equal changes.
    """
    counts, changes = zip(*(_CHANGES[name] for name in policy), strict=True)
    numbers = to_device(numbers, images.device)
    for change, u in zip(changes, numbers.split(counts, dim=1), strict=True):
        images = change(images, u)
    return images.contiguous(memory_format=torch.channels_last)


def _translation(images: Tensor, u: Tensor) -> Tensor:
    """Shift by up to an eighth of each side; what comes in is black and white's middle."""
    height, width = images.shape[2:]
    down, right = (
        _whole(u[:, i], -(size // 8), size // 8) for i, size in ((0, height), (1, width))
    )
    shifted: Tensor = _Shift.apply(images, down, right)
    return shifted


class _Shift(torch.autograd.Function):
    """Each image moved by whole pixels; gradients are moved back, which is faster than to add up
    what each pixel got, as torch would."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(down, right)
        n, channels, height, width = images.shape
        # With a frame of one pixel, whatever lies outside is found at the frame.
        framed = pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        rows = (torch.arange(height, device=down.device) + down[:, None] + 1).clamp(0, height + 1)
        columns = (torch.arange(width, device=down.device) + right[:, None] + 1).clamp(0, width + 1)
        image = torch.arange(n, device=down.device)[:, None, None]
        place = (image * (height + 2) + rows[:, :, None]) * (width + 2) + columns[:, None, :]
        shifted = framed.reshape(-1, channels).index_select(0, place.flatten())
        return shifted.view(n, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        down, right = ctx.saved_tensors
        return _Shift.apply(gradient, -down, -right), None, None


def _cutout(images: Tensor, u: Tensor) -> Tensor:
    """Blank a square of half the side, its middle anywhere in the image."""

    def inside(size: int, u: Tensor) -> Tensor:
        middle = _whole(u, 0, size - 1)
        away = torch.arange(size, device=u.device) - middle[:, None]
        return (away >= -(size // 4)) & (away < size // 4)

    _, _, height, width = images.shape
    hole = inside(height, u[:, 0])[:, :, None] & inside(width, u[:, 1])[:, None, :]
    return images * ~hole[:, None]


def _color(images: Tensor, u: Tensor) -> Tensor:
    """Brightness by up to a quarter of black to white, saturation 0 to 2, contrast 0.5 to 1.5."""
    brightness, saturation, contrast = u.to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    images = images.mean(1, keepdim=True).lerp(images, 2 * saturation)
    return images.mean((1, 2, 3), keepdim=True).lerp(images, contrast + 0.5)


def _whole(u: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers from `low` to `high`, both included, from numbers between 0 and 1."""
    return (u * (high - low + 1)).long() + low


# By its name in `augment`: how many random numbers a change takes for an image, and what it does.
_CHANGES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "translation": (2, _translation),
    "cutout": (2, _cutout),
    "color": (3, _color),
}
