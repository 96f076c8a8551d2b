"""A torch Dataset in the place of prepared images: each image is read whenever it is needed.

That is how dask-pytorch-ddp's S3ImageFolder works. It is far slower than images that
were prepared once, which `benchmarks/data_path.py` measures; but a Dataset that
exists already trains as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gan_lib.base.errors import ParameterError, SourceError
from gan_lib.data.batches import check_images
from gan_lib.data.decoding import fit_image
from gan_lib.data.image_set import ImageSet, evenly_spread
from gan_lib.data.images import prepare_images
from gan_lib.parameters import TrainingParameters

# A Dataset is mostly waiting for its store. Processes are no way out: a Dask worker is
# daemonic, and may not start any.
THREADS = 8
# How many images are looked at before training starts.
LOOK_AT = 8


def training_images(
    p: TrainingParameters,
    images: ImageSet | Dataset[Any] | None,
    resume: bool = False,
    progress: bool = True,
) -> ImageSet:
    """What is trained on: these images, or those of `p.source`.

    Raises:
        As `prepare_images`, `dataset_images` and `check_images`.
    """
    if images is None:
        images = prepare_images(
            p.source, p.image_size, p.channels, p.crop, p.max_images, progress=progress
        )
    elif not isinstance(images, ImageSet):
        images = dataset_images(images, p.image_size, p.channels, p.crop)
    check_images(images, p, resume)
    return images


def dataset_images(
    dataset: Dataset[Any], image_size: int, channels: int, crop: str = "center"
) -> ImageSet:
    """A map-style Dataset of `(image, label)` as images to train on.

    Args:
        dataset: its images are PIL images of any size, which are turned upright, cut and
            resized; or uint8 pixels, or floats in [-1, 1], of the right size already, as
            arrays or tensors, H x W x C or C x H x W. Whatever its own transform draws at
            random is not drawn again by a resumed run.
        image_size: pixels per side.
        channels: 1 or 3.
        crop: "center" or "squash", for PIL images.

    Returns:
        A set whose pixels are read each time they are asked for.

    Raises:
        ParameterError: if it is no such Dataset, or its images have another size or range.
        SourceError: if an image cannot be read.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ParameterError(
            f"images is a {type(dataset).__name__}, expected an ImageSet or a torch Dataset with "
            "a length and an index, whose items are pairs of image and label"
        )
    if crop == "box":
        raise ParameterError("crop is 'box', but a Dataset has no boxes: use 'center' or 'squash'")
    n = len(dataset)
    if n == 0:
        raise SourceError(f"the {type(dataset).__name__} is empty: it needs at least one image")
    pixels = _DatasetPixels(dataset, (n, image_size, image_size, channels), crop)
    some = evenly_spread(min(LOOK_AT, n), n)
    floats = [image for image in map(pixels.raw, some.tolist()) if _is_float(image)]
    if floats and all(image.min() >= 0 for image in floats):
        raise ParameterError(
            f"the Dataset's images are floats from {min(image.min() for image in floats):.2f} to "
            f"{max(image.max() for image in floats):.2f}, expected -1 to 1: add "
            "transforms.Normalize(0.5, 0.5) to its transform, after ToTensor"
        )
    pixels.image(0)  # raises if its size or values are others
    classes = tuple(map(str, getattr(dataset, "classes", None) or ["images"]))
    labels = np.asarray(getattr(dataset, "targets", np.zeros(n)), dtype=np.int64)
    # Not of pixels: those that its transform draws at random are others each time.
    digest = hashlib.sha256(f"{n} {classes} {labels.tolist()}".encode())
    return ImageSet(
        pixels, labels, classes, source=type(dataset).__name__, digest=digest.hexdigest()
    )


@dataclass(frozen=True)
class _DatasetPixels:
    """Indexed like an array of N x H x W x C uint8, and reads what it is asked for."""

    dataset: Dataset[Any]
    shape: tuple[int, ...]
    crop: str

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.image, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.uint8, copy=False)

    def __getitem__(self, key: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return self.image(int(key))
        chosen = np.arange(len(self))[key]
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self.image, chosen.tolist())))

    def raw(self, index: int) -> Image.Image | np.ndarray:
        """What the Dataset has there; a tensor as an array."""
        try:
            image, _ = self.dataset[index]
        # What a Dataset raises is its own affair: a bad file, a network, a bug.
        except Exception as error:
            raise self._cannot_be_read(index, error) from error
        return image.detach().cpu().numpy() if isinstance(image, Tensor) else image

    def image(self, index: int) -> np.ndarray:
        """One image: uint8, H x W x C."""
        _, size, _, channels = self.shape
        image = self.raw(index)
        if isinstance(image, Image.Image):
            try:
                return fit_image(image, size, channels, self.crop)
            except (OSError, ValueError) as error:
                raise self._cannot_be_read(index, error) from error
        image = np.asarray(image)
        if image.shape == (channels, size, size):
            image = image.transpose(1, 2, 0)
        if image.shape != (size, size, channels):
            raise ParameterError(
                f"image {index}{self._name(index)} of the Dataset is {image.shape}, but image_size "
                f"and channels ask for {channels} x {size} x {size}: let its transform resize and "
                "cut the images, or return them as PIL images"
            )
        if image.dtype == np.uint8:
            return image
        if not (_is_float(image) and np.isfinite(image).all() and np.abs(image).max() <= 1 + 1e-3):
            raise ParameterError(
                f"image {index}{self._name(index)} of the Dataset is {image.dtype} from "
                f"{image.min():.2f} to {image.max():.2f}, expected -1 to 1 (or uint8 pixels): use "
                "transforms.Normalize(0.5, 0.5) after ToTensor"
            )
        return np.round((image + 1) * 127.5).clip(0, 255).astype(np.uint8)

    def _cannot_be_read(self, index: int, error: Exception) -> SourceError:
        return SourceError(
            f"image {index}{self._name(index)} of the {type(self.dataset).__name__} cannot be "
            f"read: {type(error).__name__}: {error}. Take it out, or use prepare_images, which "
            "skips such files"
        )

    def _name(self, index: int) -> str:
        for attribute in ("all_files", "samples", "imgs"):
            names = getattr(self.dataset, attribute, None)
            if names is not None and index < len(names):
                name = names[index]
                return f" ({os.fspath(name[0] if isinstance(name, tuple) else name)})"
        return ""


def _is_float(image: Any) -> TypeGuard[np.ndarray]:
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"
