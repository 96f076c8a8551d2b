"""A trained generator draws: latent vectors, and the images that it makes of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gan_lib.base.errors import ParameterError
from gan_lib.data.pixels import denormalise
from gan_lib.gan.models import Generator

# Images that are drawn at once.
AT_ONCE = 256


def latent_vectors(n: int, nz: int, seed: int) -> Tensor:
    """Standard normal latent vectors, n x nz, the same for the same seed on every device."""
    return torch.randn(n, nz, generator=torch.Generator().manual_seed(seed))


def random_labels(generator: Generator, n: int, seed: int) -> Tensor | None:
    """Classes to draw, n, as often as they are among the real images; None if there are none."""
    if not generator.classes:
        return None
    counts = torch.tensor(list(generator.classes.values()), dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    return torch.multinomial(counts, n, replacement=True, generator=random)


def in_parts(
    generator: Generator, z: Tensor, labels: Tensor | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """What a generator is called with, so many at once that memory holds them, on its device."""
    device = next(generator.parameters()).device
    told = [z] if labels is None else [z, labels]
    return zip(*(values.to(device).split(AT_ONCE) for values in told), strict=True)


@torch.no_grad()
def render(generator: Generator, z: Tensor, labels: Tensor | None = None) -> np.ndarray:
    """The images of latent vectors, in eval mode: uint8, N x H x W x C.

    Eval mode, so that an image depends on its own latent vector (and class) alone and not
    on what else is in the batch. `labels` are needed where the generator has classes.
    """
    was_training = generator.training
    generator.eval()
    try:
        images = torch.cat([generator(*part) for part in in_parts(generator, z, labels)])
    finally:
        generator.train(was_training)
    pixels = denormalise(images, *generator.normalisation).cpu()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def generate_images(
    generator: Generator,
    n: int,
    seed: int = 0,
    of: str | None = None,
    part: slice = slice(None),
) -> np.ndarray:
    """Make `n` new images: uint8, n x H x W x C.

    Args:
        generator: trained.
        n: how many.
        seed: another one, other images.
        of: a class, by its name or a part of it; None draws them as often as they are among the
            real images.
        part: only these of the `n`; each rank may draw another.

    Raises:
        ParameterError: if there is no such class.
    """
    z, labels = latent_vectors(n, generator.nz, seed), random_labels(generator, n, seed)
    if of is not None:
        labels = torch.full((n,), class_called(generator, of))
    return render(generator, z[part], None if labels is None else labels[part])


def latent_walk(generator: Generator, stops: int = 4, steps: int = 8, seed: int = 0) -> np.ndarray:
    """Images on the way between random latent vectors.

    The way follows the sphere (slerp): Gaussian vectors of length nz have nearly equal norms, and
    a straight line leads through the middle, where the generator has seen none (arXiv:1609.04468).
    A generator that knows classes draws one of them all the way.

    Returns:
        uint8, (stops - 1) * steps x H x W x C.
    """
    way = walk(latent_vectors(stops, generator.nz, seed), np.linspace(0, 1, steps))
    labels = random_labels(generator, 1, seed)
    return render(generator, way, None if labels is None else labels.expand(len(way)))


def walk(stops: Tensor, parts: np.ndarray) -> Tensor:
    """Latent vectors on the way from each of some to the next, see `latent_walk`.

    Args:
        stops: S x nz.
        parts: how much of the way from one to the next is done, 0 to 1.

    Returns:
        (S - 1) * len(parts) x nz.
    """
    way = [_slerp(a, b, t) for a, b in pairwise(stops.numpy()) for t in parts]
    return torch.from_numpy(np.stack(way)).float()


def latent_of_seed(
    generator: Generator, seed: int, label: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The latent vector of a seed, 1 x nz, and its class, 1, if the generator knows any.

    They are drawn by Python alone: whoever has neither gan_lib nor torch gets the same.

    Args:
        generator: to draw with.
        seed: 0 or more.
        label: of a class; None draws one as `random_labels`.
    """
    rng = random.Random(seed)
    z = torch.tensor([[rng.gauss(0, 1) for _ in range(generator.nz)]])
    counts = list(generator.classes.values())
    if not counts:
        return z, None
    if label is None:
        (label,) = rng.choices(range(len(counts)), counts)
    return z, torch.tensor([label])


def draw_seeds(
    generator: Generator, seeds: Iterable[int], label: int | None = None
) -> Iterator[np.ndarray]:
    """The image of each seed, see `latent_of_seed`: uint8, H x W x C.

    In double precision, so that it is the same one on every machine, whatever else is drawn.
    """
    exact = copy.deepcopy(generator).double()
    for seed in seeds:
        z, labels = latent_of_seed(generator, seed, label)
        yield render(exact, z.double(), labels)[0]


def class_called(generator: Generator, name: str) -> int:
    """Index of the one class whose name is `name`, or holds it.

    Raises:
        ParameterError: if there is none, or more than one.
    """
    names = list(generator.classes)
    if name in names:
        return names.index(name)
    found = [known for known in names if name.lower() in known.lower()]
    if len(found) == 1:
        return names.index(found[0])
    if not names:
        raise ParameterError(
            f"of is {name!r}, and this generator knows no classes: train one with conditional=True"
        )
    raise ParameterError(
        f"of is {name!r}, which is the name of {len(found) or 'none'} of its classes: take one of "
        + ", ".join(found or names)
    )


def _slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    point: np.ndarray = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return point
