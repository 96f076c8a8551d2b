"""How good the pictures are while a training goes on: measured by all ranks together.

Each rank draws its part of the same images, and looks at it; rank 0 compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError
from gan_lib.base.progress import ProgressBar
from gan_lib.data.image_set import ImageSet
from gan_lib.parameters import TrainingParameters
from gan_lib.quality.features import (
    BATCH,
    MOST_IMAGES,
    EfficientNetLite0,
    FeatureCache,
    features_of,
)
from gan_lib.quality.scores import FEWEST, Reference
from gan_lib.results.quality import no_longer_better, quality_line, quality_seed
from gan_lib.training.networks import Training
from gan_lib.training.ranks import Ranks

# Real images that the ranks look at before they bring their features together.
ROUND = 64 * BATCH


def quality_network(p: TrainingParameters, n_images: int) -> EfficientNetLite0 | None:
    """What a training is measured with; None if it is not.

    Raises:
        ParameterError: if there are too few real images.
        SourceError: as `EfficientNetLite0`.
    """
    if not p.quality_every:
        return None
    if n_images < FEWEST:
        raise ParameterError(
            f"quality_every is {p.quality_every}, and there are {n_images} images: quality is "
            f"measured with at least {FEWEST}. Add images, or set it to 0"
        )
    return EfficientNetLite0()


class Measuring:
    """Measures what a training draws, epoch by epoch; all ranks have one, and call it together.

    Args:
        training: whose generator draws.
        images: that it learns from.
        network: whose features are compared; None measures nothing.
        lines: of the epochs that were measured before.
        show: a progress bar, while the real images are looked at.

    Attributes:
        lines: one for each measured epoch, the same on every rank.
    """

    def __init__(
        self,
        training: Training,
        images: ImageSet,
        network: EfficientNetLite0 | None,
        lines: list[dict[str, Any]],
        show: bool,
    ) -> None:
        self.lines = lines
        self._training, self._network, self._n_images = training, network, len(images)
        if network is None:
            return
        network.to(training.device)
        real = images.limited(MOST_IMAGES)
        features = _real_features(training.ranks, real, network, show)
        self._n = min(training.parameters.quality_images, len(real) // 2)
        # Only one rank compares: the others need no memory for it.
        self._real = Reference(features, self._n) if training.ranks.rank == 0 else None

    def due(self, last: bool) -> bool:
        """Whether the epoch that is complete is to be measured."""
        every = self._training.parameters.quality_every
        return self._network is not None and (last or self._training.epoch % every == 0)

    def measure(self) -> dict[str, Any]:
        """Measure what the generator draws now.

        Raises:
            DivergenceError: if a weight is not finite.
        """
        training, network = self._training, self._network
        assert network is not None
        training.check_weights()
        seed = quality_seed(training.parameters.seed)
        features = _together(
            training.ranks,
            range(self._n),
            lambda part: features_of(training.generate(self._n, seed, part), network),
        )

        def compare() -> dict[str, Any]:
            assert self._real is not None
            place = training.epoch, training.iteration, self._n_images
            return quality_line(*place, features, self._real, network.name)

        line: dict[str, Any] = training.ranks.from_first(compare)
        self.lines.append(line)
        return line

    def is_best(self) -> bool:
        """Whether the last measurement is the best so far."""
        kids = [line["kid"] for line in self.lines]
        return bool(kids[-1] == min(kids))

    def enough(self) -> str:
        """Why the training may end, see `no_longer_better`."""
        return no_longer_better(self.lines, self._training.parameters.patience)


def _real_features(
    ranks: Ranks, images: ImageSet, network: EfficientNetLite0, show: bool
) -> Tensor:
    """As `real_features`, by all ranks; only rank 0 gets them."""
    cache = FeatureCache(images, network)
    found = cache.read() if ranks.rank == 0 else None
    if ranks.from_first(lambda: found is not None):
        return torch.empty(0) if found is None else found
    features = []
    with ProgressBar(len(images), "comparing", "image", show=show) as bar:
        for start in range(0, len(images), ROUND):
            some = range(len(images))[start : start + ROUND]
            features.append(
                _together(ranks, some, lambda part: features_of(images.pixels[part], network))
            )
            bar.update(len(some))
    found = torch.cat(features)
    if ranks.rank == 0:
        cache.write(found)
    return found


def _together(ranks: Ranks, some: range, compute: Callable[[slice], Tensor]) -> Tensor:
    """The features of some images, of which each rank computes those of a part.

    The parts are of whole batches, so that the same images go through the network together on
    any number of ranks.
    """
    batches = np.array_split(np.array(some[::BATCH]), ranks.world_size)[ranks.rank]
    features = torch.empty(0)
    if len(batches):
        features = compute(slice(int(batches[0]), min(int(batches[-1]) + BATCH, some.stop)))
    parts = ranks.gather(features.numpy())
    return torch.from_numpy(np.concatenate([part for part in parts if len(part)]))
