"""New, or remembered? Each generated image beside the training image that is nearest to it.

A network that has learnt its images by heart draws them again, and every score calls that
perfect. Who is new has no one nearest image, but several that are about as near; what is
remembered is much nearer to one of them than to any other. How much nearer real images are to
one other by chance is measured on themselves, each as if it were new.

Nearness is looked at twice: in the features of a network, and in pixels, averaged in coarse cells,
because the noise over what a small generator draws from memory leads the network astray. An image
is as suspicious as the more suspicious of the two says. So look at the pairs, too.
(Carlini et al. 2023, arXiv:2301.13188, section 4, compare an image with its neighbours likewise.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gan_lib.base.errors import ParameterError
from gan_lib.base.progress import ProgressBar
from gan_lib.data.image_set import ImageSet, evenly_spread
from gan_lib.quality.features import EfficientNetLite0, FeatureNetwork, features_of, real_features
from gan_lib.quality.scores import FEWEST

# Images nearer to each other than this part of the median distance are one image, twice.
SAME = 0.2
# Cells per side in which pixels are averaged.
CELLS = 16
# So few of the real images are as near to one other, by chance. A set is remembered if so many
# times as many of it are, and more than so many standard errors explain: 0 to 5 % were of what
# generators had drawn that had seen thousands of images, 12 to 31 % where one had seen 50.
CHANCE, TIMES, ERRORS = 0.05, 3, 3
# Real images that are looked at as if they were new, at most; and images at a time.
MOST_PROBES, ROWS = 1_000, 256


@dataclass(frozen=True)
class NearestImages:
    """Generated images and the training images nearest to them, the most suspicious first.

    Attributes:
        generated: indices of the generated images, n.
        real: indices of the training images nearest to them, n.
        ratios: the distance to it over that to the next one that is another image, n, in units of
            what 5 % of the real images have by chance: 1 and above for what is new, near 0 for a
            copy.
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
    def limit(self) -> float:
        """The part of them that chance may explain."""
        error = math.sqrt(CHANCE * (1 - CHANCE) / len(self.ratios))
        return max(TIMES * CHANCE, CHANCE + ERRORS * error)

    @property
    def remembered(self) -> bool:
        """Whether they are many more than chance explains."""
        return self.suspicious > self.limit

    def __str__(self) -> str:
        what = "remembered" if self.remembered else "new"
        return (
            f"{what}: {self.suspicious:.0%} of {len(self.ratios):,} generated images are nearer "
            f"to one of {self.n_real:,} training images than to the next, as {CHANCE:.0%} of real "
            f"images are to another; above {self.limit:.0%} they are taken for remembered"
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
    probes = torch.from_numpy(evenly_spread(min(MOST_PROBES, len(images)), len(images)))
    n_looks = 2 * (len(generated) * (3 if flip else 1) + len(probes) * (2 if flip else 0))
    spaces = [(one, real_features(images, one, progress)) for one in (network, coarse_pixels)]
    with ProgressBar(n_looks, "searching", "image", show=progress) as bar:
        looks = [
            _look(generated, images, probes, flip, seen, partial(features_of, network=one, bar=bar))
            for one, seen in spaces
        ]
    real, ratios, by_chance = (torch.stack(parts) for parts in zip(*looks, strict=True))
    ratios, which = ratios.min(0)
    by_chance = by_chance.min(0).values
    real = real.gather(0, which[None])[0]
    order = ratios.argsort()
    return NearestImages(
        generated=order.numpy(),
        real=real[order].numpy(),
        ratios=ratios[order].numpy(),
        threshold=by_chance.nanquantile(CHANCE).item(),
        n_real=len(images),
        by_chance=by_chance.numpy(),
    )


def _look(
    generated: np.ndarray,
    images: ImageSet,
    probes: Tensor,
    flip: bool,
    seen: Tensor,
    look: Callable[[np.ndarray], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """With one kind of look: the nearest real image of each generated one and its ratio, and the
    ratios of real ones, each as if it were new; in units of what 5 % of the real ones have.

    `look` finds the features that tell how near images are, and `seen` are those of all real ones.
    """
    same = SAME * torch.cdist(seen[probes], seen[probes]).median()

    def distances(found: Tensor, pixels: np.ndarray) -> Tensor:
        """From all real images, of images in which this was found."""
        rows = torch.cdist(found, seen)
        return rows.minimum(torch.cdist(look(pixels[:, :, ::-1]), seen)) if flip else rows

    def nearest(found: Tensor, pixels: np.ndarray, closest: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest real image of each that is not closer than this, and its ratio."""
        rows = distances(found, pixels)
        rows[rows < closest] = torch.inf
        first = rows.min(1)
        twins = distances(seen[first.indices], images.pixels[first.indices.numpy()]) < same
        return first.indices, first.values / rows.masked_fill(twins, torch.inf).min(1).values

    # Each real image as if it were new: without itself, and whatever else is the same.
    by_chance = torch.cat(
        [nearest(seen[some], images.pixels[some.numpy()], same)[1] for some in probes.split(ROWS)]
    )
    pairs = [
        nearest(look(some), some, torch.zeros(()))
        for some in np.split(generated, range(ROWS, len(generated), ROWS))
    ]
    real, ratios = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    unit = by_chance.nanquantile(CHANCE)
    return real, ratios / unit, by_chance / unit


def coarse_pixels(images: Tensor) -> Tensor:
    """Means over 16 x 16 cells, as a `FeatureNetwork`: uint8, N x C x H x W -> N x (256 C)."""
    return adaptive_avg_pool2d(images.float(), min(CELLS, images.shape[2])).flatten(1)
