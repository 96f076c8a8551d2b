"""New, or remembered? Each generated image beside the training image that is nearest to it.

A network that has learnt its images by heart draws them again, and every score calls that
perfect. Who is new has no one nearest image, but several that are about as near; what is
remembered is much nearer to one of them than to any other. How much nearer real images are to
one other by chance is measured on themselves, each as if it were new. That finds copies with
little noise; what a small generator draws from memory with much noise, of few images that are
alike, it takes for new: so look at the pairs, too.
(Carlini et al. 2023, arXiv:2301.13188, section 4, compare an image with its neighbours likewise.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError
from gan_lib.base.progress import ProgressBar
from gan_lib.data.image_set import ImageSet, evenly_spread
from gan_lib.quality.features import EfficientNetLite0, FeatureNetwork, features_of, real_features
from gan_lib.quality.scores import FEWEST

# Images nearer to each other than this part of the median distance are one image, twice.
SAME = 0.2
# Real images that are looked at as if they were new, at most; and images at a time.
MOST_PROBES, ROWS = 1_000, 256
# So few of the real images are as near to one other, by chance; and a set is remembered if so
# many times as many of it are. Of what generators that had seen thousands drew, 1 to 5 % were.
CHANCE, TIMES = 0.05, 4


@dataclass(frozen=True)
class NearestImages:
    """Generated images and the training images nearest to them, the most suspicious first.

    Attributes:
        generated: indices of the generated images, n.
        real: indices of the training images nearest to them, n.
        ratios: the distance to it over that to the next one that is another image, n: near 1
            for what is new, near 0 for a copy.
        threshold: below this are 5 % of the real images.
        n_real: training images that were looked at.
        by_chance: the ratios of real images, each as if it were new.
    """

    generated: np.ndarray
    real: np.ndarray
    ratios: np.ndarray
    threshold: float
    n_real: int
    by_chance: np.ndarray

    @property
    def suspicious(self) -> float:
        """The part of the generated images that are below the threshold."""
        return float((self.ratios < self.threshold).mean())

    @property
    def remembered(self) -> bool:
        """Whether they are many more than chance explains."""
        return self.suspicious > TIMES * CHANCE

    def __str__(self) -> str:
        what = "remembered" if self.remembered else "new"
        return (
            f"{what}: {self.suspicious:.0%} of {len(self.ratios):,} generated images are nearer "
            f"to one of {self.n_real:,} training images than to the next, as {CHANCE:.0%} of real "
            f"images are to another; above {TIMES * CHANCE:.0%} they are taken for remembered"
        )


def nearest_training_images(
    generated: np.ndarray,
    images: ImageSet,
    network: FeatureNetwork | None = None,
    flip: bool = True,
    progress: bool = True,
) -> NearestImages:
    """Find for each generated image the nearest training image, and whether that is too near.

    Args:
        generated: uint8, n x H x W x C; some hundreds are enough.
        images: all that the generator has learnt from; what is among them twice counts once.
        network: whose features tell what is near; None takes EfficientNet-lite0.
        flip: a mirrored image is the same image, as for a training with `flip`.
        progress: show progress bars.

    Raises:
        ParameterError: if there are too few training images.
    """
    if len(images) < FEWEST:
        raise ParameterError(
            f"there are {len(images)} images: what is near is told from at least {FEWEST}"
        )
    network = network or EfficientNetLite0()
    features = real_features(images, network, progress)
    probes = torch.from_numpy(evenly_spread(min(MOST_PROBES, len(images)), len(images)))
    same = SAME * torch.cdist(features[probes], features[probes]).median()

    def distances(found: Tensor, pixels: np.ndarray) -> Tensor:
        """From all real images, of images with these features."""
        rows = torch.cdist(found, features)
        if flip:
            mirrored = features_of(pixels[:, :, ::-1], network, bar)
            rows = rows.minimum(torch.cdist(mirrored, features))
        return rows

    def nearest(found: Tensor, pixels: np.ndarray, closest: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest real image of each that is not closer than this, and its ratio."""
        rows = distances(found, pixels)
        rows[rows < closest] = torch.inf
        first = rows.min(1)
        twins = distances(features[first.indices], images.pixels[first.indices.numpy()]) < same
        return first.indices, first.values / rows.masked_fill(twins, torch.inf).min(1).values

    n_looks = len(generated) * (3 if flip else 1) + len(probes) * (2 if flip else 0)
    with ProgressBar(n_looks, "searching", "image", show=progress) as bar:
        # Each real image as if it were new: without itself, and whatever else is the same.
        by_chance = torch.cat(
            [
                nearest(features[some], images.pixels[some.numpy()], same)[1]
                for some in probes.split(ROWS)
            ]
        )
        pairs = [
            nearest(features_of(some, network, bar), some, torch.zeros(()))
            for some in np.split(generated, range(ROWS, len(generated), ROWS))
        ]
    real, ratios = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    order = ratios.argsort()
    return NearestImages(
        generated=order.numpy(),
        real=real[order].numpy(),
        ratios=ratios[order].numpy(),
        threshold=by_chance.nanquantile(CHANCE).item(),
        n_real=len(images),
        by_chance=by_chance.numpy(),
    )
