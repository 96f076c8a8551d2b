"""Images that come inside a Python package: no network, and no trust in its pickles."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from gan_lib.sources import manifest


def package_images(entry: dict[str, Any], image_size: int, channels: int) -> np.ndarray:
    """The images of an entry with a `package`: uint8, N x image_size x image_size x channels.

    Raises:
        SourceError: if the package is missing, or holds other bytes than the manifest says.
    """
    images, labels = package_arrays(entry)
    chosen = images[labels == entry["package"]["label"]]
    size = (image_size, image_size)
    pixels = np.stack(
        [np.asarray(Image.fromarray(a).resize(size, Image.Resampling.BICUBIC)) for a in chosen]
    )
    return np.repeat(pixels[..., None], channels, axis=-1)


def package_arrays(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a package, as they are stored.

    Raises:
        SourceError: as `package_images`.
    """
    package = entry["package"]

    def load(part: Mapping[str, Any]) -> np.ndarray:
        packed = manifest.package_file(package["name"], part["path"], part["sha256"])
        array: np.ndarray = _ArrayUnpickler(io.BytesIO(gzip.decompress(packed))).load()
        return array

    return load(package["images"]), load(package["labels"])


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled NumPy array and refuses every other object.

    A pickle can call any function it names; this one can only name what an array needs.
    """

    _ALLOWED: ClassVar = {
        # Where NumPy keeps it differs between its versions; the array itself knows.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array") from None
