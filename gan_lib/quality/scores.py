"""Features -> scores: how far the images of one set are from those of another.

Losses cannot say how good a picture is: each network's is measured by the other. These
compare many generated images with many real ones. No score is 0 for real images either: each
stands beside its floor, which is what as many other real images get.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError

# Real images that others are compared with at most, and the rows of a matrix that are computed
# at a time: 10,000 x 10,000 distances would be 400 MB.
MOST_REAL, ROWS = 10_000, 1_024
# Neighbours that make an image's surroundings (arXiv:1904.06991, section 3.1).
NEIGHBOURS = 3
# Parts, each of other images, whose KIDs say how much it varies.
PARTS = 10
FEWEST = 16  # real images, of which half are compared with the others

Scores = dict[str, float]


class Reference:
    """Real images, with which others are compared.

    Some of the real images are left out of it, and compared with it as if they were generated:
    what they get is the floor of each score.

    Args:
        features: of the real images, N x d.
        n: how many images are compared with it at a time; at most half of the real ones, so
            that the floor is of as many.

    Attributes:
        n: of them.
        floor: the scores of `n` other real images.

    Raises:
        ParameterError: if there are too few real images.
    """

    def __init__(self, features: Tensor, n: int) -> None:
        if len(features) < FEWEST:
            raise ParameterError(
                f"there are {len(features)} images: quality is measured with at least {FEWEST}"
            )
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        self.n = min(n, len(features) // 2)
        real = self._real = features[order[self.n :][:MOST_REAL]]
        self._kernel = _mean_of_pairs(real)
        self._radii = _radii(real)
        self._mean, _, self._covariance = _moments(real)
        self.floor = self.scores(features[order[: self.n]])

    def scores(self, features: Tensor) -> Scores:
        """How far images are from the real ones; each number has its docstring below.

        Args:
            features: of the images, n x d.

        Returns:
            "kid", "kid_spread", "fd", "precision" and "recall".
        """
        kid, spread = self._kid(features)
        precision, recall = self._precision_and_recall(features)
        return {
            "kid": kid,
            "kid_spread": spread,
            "fd": self._frechet_distance(features),
            "precision": precision,
            "recall": recall,
        }

    def _kid(self, features: Tensor) -> tuple[float, float]:
        """Kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401, section 4).

        The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, unbiased: 0 on
        average for images that are as the real ones, however few, and so at times below. Its
        spread is the standard error of the mean over PARTS disjoint parts of both sets.
        """
        n_parts = min(PARTS, len(features) // 2)
        parts = zip(features.tensor_split(n_parts), self._real.tensor_split(n_parts), strict=True)
        values = torch.tensor([_mmd(some, real, _mean_of_pairs(real)) for some, real in parts])
        kid = _mmd(features, self._real, self._kernel)
        return kid, (values.std() / n_parts**0.5).item()

    def _frechet_distance(self, features: Tensor) -> float:
        """Frechet distance (Heusel et al. 2017, arXiv:1706.08500, section 2): the FID, if the
        network is Inception.

        As if both sets were Gaussian. It is biased: the fewer images, the larger.
        """
        mean, factor, covariance = _moments(features)
        # The trace of the root of a product of covariances, from a symmetric one that has the
        # same eigenvalues; the smaller one, for few images.
        if len(factor) < len(mean):
            product = factor @ self._covariance @ factor.T
        else:
            product = self._root @ covariance @ self._root
        root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        apart = (mean - self._mean).square().sum()
        return float(apart + covariance.trace() + self._covariance.trace() - 2 * root)

    @cached_property
    def _root(self) -> Tensor:
        """The square root of the covariance."""
        values, vectors = torch.linalg.eigh(self._covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root

    def _precision_and_recall(self, features: Tensor) -> tuple[float, float]:
        """Which part of the images looks real, and which part of the real ones is covered.

        An image lies within a set if it is nearer to some image of it than that one's third
        neighbour (Kynkaanniemi et al. 2019, arXiv:1904.06991). Blur lowers recall and not
        precision: blurred images lie among the real ones, but all together in the middle.
        Density and coverage (arXiv:2002.09797) were tried too. Both rise with weak blur.
        """
        radii = _radii(features)
        precise = 0
        recalled = torch.zeros(len(self._real), dtype=torch.bool)
        for some, rows in _distances(features, self._real):
            precise += int((rows <= self._radii).any(1).sum())
            recalled |= (rows <= radii[some, None]).any(0)
        return precise / len(features), recalled.double().mean().item()


def _mmd(features: Tensor, real: Tensor, real_pairs: float) -> float:
    both = sum(_kernel(rows, real) for rows in features.split(ROWS)) / (len(features) * len(real))
    return real_pairs + _mean_of_pairs(features) - 2 * both


def _mean_of_pairs(features: Tensor) -> float:
    """The mean kernel of each with each other, and not with itself."""
    n = len(features)
    total = sum(_kernel(rows, features) for rows in features.split(ROWS))
    own = (features.square().sum(1) / features.shape[1] + 1).pow(3).sum(dtype=torch.float64)
    return (total - own.item()) / (n * (n - 1))


def _kernel(a: Tensor, b: Tensor) -> float:
    """The sum of the kernel of each row of `a` with each of `b`."""
    values = (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)
    return values.sum(dtype=torch.float64).item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, a factor whose square is the covariance, and that; in float64."""
    mean = features.mean(0, dtype=torch.float64)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    return mean, factor, factor.T @ factor


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The distances of some rows of `a` to all of `b` at a time, and which rows those are."""
    for start in range(0, len(a), ROWS):
        some = slice(start, start + ROWS)
        yield some, torch.cdist(a[some], b, compute_mode="use_mm_for_euclid_dist")


def _radii(features: Tensor) -> Tensor:
    """The distance of each to its third neighbour."""
    k = min(NEIGHBOURS, len(features) - 1) + 1  # the nearest is the image itself
    rows = [d.topk(k, largest=False).values[:, -1] for _, d in _distances(features, features)]
    return torch.cat(rows)
