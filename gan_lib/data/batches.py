"""Arrays -> batches: disjoint, complete shares for every rank, mirrored on the device.

All randomness is a function of the seed, the epoch and the step, and is drawn
for the whole batch before each rank takes its share. So the ranks agree without
talking, a run continues in the middle as if it had never stopped, and the same
images meet in the same step on 1 rank or on 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError
from gan_lib.base.seeds import FLIPS, ORDER, stream_seed
from gan_lib.data.image_set import ImageSet
from gan_lib.data.pixels import Pixels, normalise, to_device
from gan_lib.parameters import TrainingParameters

# A GPU keeps all images, as uint8, if they take no more than this part of its memory.
MOST_OF_A_GPU = 0.1
# How many images are copied to it at once, for that.
AT_ONCE = 4096


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
        resident: whether all images are kept on the device, where a batch is then picked from
            them; None does so on a GPU, if they take no more than a tenth of its memory.
        steps_per_epoch: how many batches each epoch has.

    Raises:
        ParameterError: if there are too few images for that many ranks.
    """

    images: ImageSet
    parameters: TrainingParameters
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    resident: bool | None = None
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = len(self._shares(epoch=1))
        self._device = torch.device(self.device)
        if self.resident is None:
            self.resident = _fits(self.images.pixels, self._device)
        self._labels = torch.tensor(self.images.labels, device=self._device)
        if self.resident:
            self._kept = _copied(self.images.pixels, self._device)

    def _shares(self, epoch: int) -> list[list[np.ndarray]]:
        p = self.parameters
        return epoch_shares(len(self.images), p.batch_size, self.world_size, p.seed, epoch)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, in order; those before `first_step` are left out."""
        steps = self._shares(epoch)[first_step:]
        fetched = self._fetched([shares[self.rank] for shares in steps])
        for step, shares in enumerate(steps, first_step):
            start = sum(len(share) for share in shares[: self.rank])
            mine, n_total = shares[self.rank], sum(map(len, shares))
            index = to_device(torch.from_numpy(mine), self._device)
            pixels = self._kept[index] if self.resident else next(fetched)
            # N x H x W x C seen as N x C x H x W is torch's channels_last: nothing is copied.
            images = normalise(pixels.permute(0, 3, 1, 2), *self.parameters.normalisation)
            share = slice(start, start + len(mine))
            if self.parameters.flip:
                images = self._flipped(images, epoch, step, share, n_total)
            yield Batch(
                images=images,
                labels=self._labels[index],
                share=share,
                n_total=n_total,
                weight=len(mine) * self.world_size / n_total,
            )

    def _fetched(self, shares: list[np.ndarray]) -> Iterator[Tensor]:
        """The pixels of each share, on the device: uint8, n x H x W x C."""
        if self._device.type == "cpu" and isinstance(self.images.pixels, np.ndarray):
            yield from (torch.from_numpy(self.images.pixels[share]) for share in shares)
        else:
            # What has to be read, or copied, is fetched while the step before it goes on.
            with ThreadPoolExecutor(1, "fetching") as pool:
                fetched = (pool.submit(self.images.pixels.__getitem__, share) for share in shares)
                for pixels, _ in pairwise(chain(fetched, [None])):
                    assert pixels is not None
                    yield to_device(torch.from_numpy(pixels.result()), self._device)

    def _flipped(self, images: Tensor, epoch: int, step: int, share: slice, n_total: int) -> Tensor:
        """Each image mirrored left to right with probability 1/2."""
        rng = np.random.default_rng(stream_seed(self.parameters.seed, FLIPS, epoch, step))
        flips = to_device(torch.from_numpy(rng.random(n_total)[share] < 0.5), self._device)
        return torch.where(flips[:, None, None, None], images.flip(-1), images)


def _fits(pixels: Pixels, device: torch.device) -> bool:
    # A Dataset is asked for its images anew each time: what it draws at random is another then.
    if device.type != "cuda" or not isinstance(pixels, np.ndarray):
        return False
    memory = torch.cuda.get_device_properties(device).total_memory
    return bool(pixels.nbytes <= MOST_OF_A_GPU * memory)


def _copied(pixels: Pixels, device: torch.device) -> Tensor:
    """All of them, part by part: they may be a file that is larger than what memory is free."""
    kept = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), AT_ONCE):
        some = np.array(pixels[start : start + AT_ONCE])
        kept[start : start + AT_ONCE] = torch.from_numpy(some)
    return kept
