"""Arrays -> batches: disjoint, complete shares for every rank, mirrored on the device.

All randomness is a function of the seed, the epoch and the step, and is drawn
for the whole batch before each rank takes its share. So the ranks agree without
talking, a run continues in the middle as if it had never stopped, and the same
images meet in the same step on 1 rank or on 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError
from gan_lib.base.seeds import FLIPS, ORDER, stream_seed
from gan_lib.data.image_set import ImageSet
from gan_lib.data.pixels import normalise
from gan_lib.parameters import TrainingParameters


def check_images(images: ImageSet, p: TrainingParameters, resume: bool = False) -> None:
    """Raise ParameterError if images have another shape than asked for, or are no whole batch.

    Runs of before may have been of fewer: `resume` lets them go on.
    """
    wanted = (p.image_size, p.image_size, p.channels)
    if images.pixels.shape[1:] != wanted:
        raise ParameterError(
            f"the images are {images.pixels.shape[1:]}, but image_size and channels "
            f"ask for {wanted}: prepare them with the same values"
        )
    if p.batch_size > len(images) and not resume:
        raise ParameterError(
            f"batch_size is {p.batch_size}, and there are {len(images)} images: give at most so "
            "many, or add images"
        )


def epoch_shares(
    n_images: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """Which images each rank sees in each step of one epoch.

    Every image is in exactly one share. The steps are as even as they can be, at
    most `batch_size` images each: 1,000 images at 64 make 16 steps of 62 or 63,
    not 15 of 64 and a last one of 40 whose BatchNorm statistics stand apart.

    Returns:
        Index arrays as `shares[step][rank]`.

    Raises:
        ParameterError: if some step had no image for some rank.
    """
    n_steps = -(-n_images // batch_size)
    if n_images // n_steps < world_size:
        raise ParameterError(
            f"batch_size {batch_size} over {n_images} images leaves a step with "
            f"{n_images // n_steps} images for {world_size} ranks: raise batch_size to at least "
            f"{world_size}, add images, or use fewer workers"
        )
    order = np.random.default_rng(stream_seed(seed, ORDER, epoch)).permutation(n_images)
    return [np.array_split(step, world_size) for step in np.array_split(order, n_steps)]


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step.

    Attributes:
        images: float32, normalised, n x C x H x W, on the training device.
        labels: int64, n, their classes, on the training device.
        share: the part `start:stop` of the whole batch that these images are.
        n_total: images of this step on all ranks together.
        weight: n * world_size / n_total. DDP gives every rank the same say in the
            mean gradient; this factor on the loss gives every image the same say.
    """

    images: Tensor
    labels: Tensor
    share: slice
    n_total: int
    weight: float


@dataclass(eq=False)
class Batches:
    """The batches of one rank.

    Attributes:
        images: what to train on.
        parameters: `batch_size`, `seed`, `flip` and those of pixel values are used.
        rank: of this process, 0 to world_size - 1.
        world_size: number of ranks.
        device: where the batches are put and mirrored.
        steps_per_epoch: how many batches each epoch has.

    Raises:
        ParameterError: if there are too few images for that many ranks.
    """

    images: ImageSet
    parameters: TrainingParameters
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = len(self._shares(epoch=1))

    def _shares(self, epoch: int) -> list[list[np.ndarray]]:
        p = self.parameters
        return epoch_shares(len(self.images), p.batch_size, self.world_size, p.seed, epoch)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, in order; those before `first_step` are left out."""
        for step, shares in enumerate(self._shares(epoch)[first_step:], first_step):
            start = sum(len(share) for share in shares[: self.rank])
            mine, n_total = shares[self.rank], sum(map(len, shares))
            pixels = torch.from_numpy(self.images.pixels[mine]).to(self.device)
            # N x H x W x C seen as N x C x H x W is torch's channels_last: nothing is copied.
            images = normalise(pixels.permute(0, 3, 1, 2), *self.parameters.normalisation)
            share = slice(start, start + len(mine))
            if self.parameters.flip:
                images = self._flipped(images, epoch, step, share, n_total)
            yield Batch(
                images=images,
                labels=torch.from_numpy(self.images.labels[mine]).to(self.device),
                share=share,
                n_total=n_total,
                weight=len(mine) * self.world_size / n_total,
            )

    def _flipped(self, images: Tensor, epoch: int, step: int, share: slice, n_total: int) -> Tensor:
        """Each image mirrored left to right with probability 1/2."""
        rng = np.random.default_rng(stream_seed(self.parameters.seed, FLIPS, epoch, step))
        flips = torch.from_numpy(rng.random(n_total)[share] < 0.5).to(self.device)
        return torch.where(flips[:, None, None, None], images.flip(-1), images)
