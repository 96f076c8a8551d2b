"""Images of one size, with their labels: in memory, or mapped from where they were prepared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gan_lib.base.errors import SourceError
from gan_lib.base.storage import Folder
from gan_lib.data.pixels import Pixels
from gan_lib.data.prepared import checksum, in_one_sentence, open_pixels, read_index


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        pixels: uint8, N x H x W x C; of prepared images it is a file mapped into memory, which
            is not to be written to.
        labels: int64, N; an index into `classes`.
        classes: names, in sorted order.
        skipped: pairs of URL and reason, for each file that is not among `pixels`.
        source: where they came from.
        prepared: the folder in which they were prepared; empty if the pixels are in memory.
        digest: stands for pixels and labels, if they need not be summed up for it.
    """

    pixels: Pixels
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    source: str = ""
    prepared: str = ""
    digest: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def __reduce__(self) -> tuple[Any, ...]:
        # What lies in a cache travels to workers as its address.
        if self.prepared:
            return open_prepared, (self.prepared,)
        values = (self.pixels, self.labels, self.classes, self.skipped, self.source)
        return ImageSet, values

    def images_per_class(self) -> dict[str, int]:
        """Class name -> number of images."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def checksum(self) -> str:
        """SHA-256 that is equal on every rank that has the same images."""
        if self.digest:
            return self.digest
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def limited(self, max_images: int) -> ImageSet:
        """At most `max_images` images, spread over the whole set; 0 means all of them."""
        if max_images == 0 or max_images >= len(self):
            return self
        chosen = evenly_spread(max_images, len(self))
        pixels, labels = self.pixels[chosen], self.labels[chosen]
        return replace(self, pixels=pixels, labels=labels, prepared="", digest="")


def evenly_spread(n: int, total: int) -> np.ndarray:
    """`n` of the indices 0 to `total` - 1, from the first to the last at even distances."""
    return np.linspace(0, total - 1, n).round().astype(np.int64)


def open_prepared(url: str, index: dict[str, Any] | None = None) -> ImageSet:
    """Open images that were prepared before, by the folder in which they were.

    Raises:
        SourceError: if they are not there, damaged, or cannot be read.
    """
    folder = Folder(url)
    with in_one_sentence(url):
        index = index or read_index(folder)
        if index is None:
            raise SourceError(
                f"there are no prepared images at {url}: give a cache that all workers reach, such "
                "as s3://bucket/cache, as cache= or in the environment variable GAN_LIB_CACHE"
            )
        pixels = open_pixels(folder, index)
    labels = [np.full(n, label, np.int64) for label, n in index["labels"]]
    return ImageSet(
        pixels=pixels,
        labels=np.concatenate(labels),
        classes=tuple(index["classes"]),
        skipped=tuple((path, why) for path, why in index["skipped"]),
        source=index["source"],
        prepared=url,
        digest=checksum(index),
    )
