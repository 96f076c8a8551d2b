"""Files -> arrays: any folder of images, local or remote, as one uint8 array.

A GAN at 64 pixels sees each image hundreds of times, and the whole of Stanford
Dogs is 253 MB as uint8. So every image is read, decoded, cut and resized once,
and training then reads memory.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from PIL import Image, ImageOps

from gan_lib import manifest
from gan_lib.errors import SourceError
from gan_lib.progress import ProgressBar

# Files fetched before they are decoded: enough to keep an object store busy, few enough
# that their bytes fit in memory many times over.
FETCH_AT_ONCE = 256
# How many files `check_source` opens before it trusts the rest of a folder.
LOOK_AT = 20


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in memory.

    Attributes:
        pixels: uint8, N x H x W x C.
        labels: int64, N; an index into `classes`.
        classes: names, in sorted order.
        skipped: pairs of URL and reason, for each file that is not among `pixels`.
        source: where they came from.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def images_per_class(self) -> dict[str, int]:
        """Class name -> number of images."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def checksum(self) -> str:
        """SHA-256 of pixels and labels: equal on every rank that read the same images."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def limited(self, max_images: int) -> ImageSet:
        """At most `max_images` images, spread over the whole set; 0 means all of them."""
        if max_images == 0 or max_images >= len(self):
            return self
        chosen = evenly_spread(max_images, len(self))
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


def evenly_spread(n: int, total: int) -> np.ndarray:
    """`n` of the indices 0 to `total` - 1, from the first to the last at even distances."""
    return np.linspace(0, total - 1, n).round().astype(np.int64)


def prepare_images(
    source: str,
    image_size: int,
    channels: int = 3,
    crop: str = "center",
    max_images: int = 0,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> ImageSet:
    """Read every image of a source and bring it to one size.

    Args:
        source: a name in data_manifest.json, or a folder (a path or any fsspec URL)
            of class folders. Images right in the folder make one class.
        image_size: pixels per side of the result.
        channels: 1 for grey, 3 for RGB.
        crop: "center" scales the shorter side and cuts the middle out;
            "squash" scales both sides and keeps everything.
        max_images: stop at this many, spread over all; 0 means all.
        storage_options: passed to the fsspec file system, e.g. `{"anon": True}` for S3.
        progress: show a progress bar.

    Raises:
        SourceError: if the source is not there, or not one image in it can be used.
    """
    entry = manifest.sources().get(source)
    if entry is not None and "package" in entry:
        images = _from_package(source, entry, image_size, channels)
        return images.limited(max_images)
    files = _list_files(source, storage_options)
    if max_images and max_images < len(files.paths):
        chosen = evenly_spread(max_images, len(files.paths))
        files = replace(files, paths=tuple(files.paths[i] for i in chosen))
    return _from_files(source, files, image_size, channels, crop, progress)


def check_source(source: str) -> None:
    """Find out within seconds whether a source can be used, without reading all of it.

    Raises:
        SourceError: if it is not there, or the first files of it hold no image.
    """
    entry = manifest.sources().get(source)
    if entry is not None and "package" in entry:
        _package_arrays(entry)
    elif entry is not None or _is_remote(source):
        # The first level only: a bucket may hold a million files.
        fs, root = _open_source(source, None)
        with _listing(source):
            found = fs.ls(root, detail=False)
        if not found:
            raise _not_there(source)
    else:
        files = _list_files(source, None)
        looked_at = files.paths[:LOOK_AT]
        if len(files.paths) <= LOOK_AT and not any(_opens(path) for path in looked_at):
            raise _no_images(source, files.paths)


def resolve_source(source: str) -> str:
    """The source as another process can read it: a local folder by its absolute path."""
    if source in manifest.sources() or _is_remote(source):
        return source
    return str(Path(source).expanduser().resolve())


def decode_image(data: bytes, image_size: int, channels: int, crop: str = "center") -> np.ndarray:
    """Decode one image file: uint8, image_size x image_size x channels.

    Turns it upright by its EXIF tag, puts transparent pixels on white, and takes
    the first frame of an animation.

    Raises:
        ValueError or OSError: with the reason, if the bytes are not a whole image.
    """
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**63):
            raise ValueError(f"{image.width} x {image.height} pixels are too many to decode safely")
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the time;
        # twice the wanted size is left for the antialiased resize.
        image.draft("RGB", (2 * image_size, 2 * image_size))
        upright = ImageOps.exif_transpose(image)
        upright = _without_alpha(_to_eight_bits(upright))
        upright = upright.convert("L" if channels == 1 else "RGB")
    size = (image_size, image_size)
    if crop == "squash":
        small = upright.resize(size, Image.Resampling.BICUBIC)
    else:
        small = ImageOps.fit(upright, size, Image.Resampling.BICUBIC)
    return np.asarray(small).reshape(image_size, image_size, channels)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16-bit grey clips at 255 and leaves a white square.
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype("u1"))
    return image


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


@dataclass(frozen=True)
class _Files:
    """All files below a source, and how to read them."""

    fs: fsspec.AbstractFileSystem
    root: str
    paths: tuple[str, ...]

    def url(self, path: str) -> str:
        return self.fs.unstrip_protocol(path)

    def class_of(self, path: str) -> str:
        folder = os.path.dirname(path)
        return os.path.basename(folder if folder != self.root else self.root)


def _open_source(
    source: str, storage_options: dict[str, Any] | None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a folder, a URL or a source of the manifest that is on S3."""
    entry = manifest.sources().get(source)
    options = storage_options or {}
    if entry is not None:
        options = {"anon": entry["s3"]["anonymous"], **options}
    url = entry["s3"]["url"] if entry else source
    fs, root = fsspec.core.url_to_fs(url if _is_remote(url) else os.path.expanduser(url), **options)
    return fs, root.rstrip("/")


@contextlib.contextmanager
def _listing(source: str) -> Iterator[None]:
    """Whatever a file system raises while it lists, as one sentence."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError:
        raise _not_there(source) from None
    # Each remote file system has exceptions of its own, with no common ancestor.
    except Exception as error:
        entry = manifest.sources().get(source)
        where = f"{source!r} ({entry['s3']['url']})" if entry else repr(source)
        raise SourceError(
            f"the source {where} cannot be listed: {error}. Check the address, the network and "
            "the credentials, or name a folder on this machine"
        ) from error


def _not_there(source: str) -> SourceError:
    return SourceError(
        f"the source {source!r} does not exist: give a folder of class folders, "
        f"or a source of data_manifest.json ({', '.join(manifest.sources())})"
    )


def _list_files(source: str, storage_options: dict[str, Any] | None) -> _Files:
    fs, root = _open_source(source, storage_options)
    with _listing(source):
        # `detail` tells an S3 folder marker of no bytes from a file.
        found = fs.find(root, detail=True)
        if not found and not fs.isdir(root):
            raise _not_there(source)
    if root in found:
        raise SourceError(f"the source {source!r} is a file, not a folder: name its folder")
    paths = sorted(p for p, info in found.items() if info["type"] == "file")
    if not paths:
        raise SourceError(f"the folder {source!r} is empty: put class folders of images into it")
    return _Files(fs, root, tuple(paths))


def _from_files(
    source: str, files: _Files, image_size: int, channels: int, crop: str, progress: bool
) -> ImageSet:
    pixels: list[np.ndarray] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        ProgressBar(len(files.paths), "reading", "image", show=progress) as bar,
    ):
        for chunk in _fetched(files):
            decoded = pool.map(
                lambda item: _decode_or_reason(item, image_size, channels, crop), chunk
            )
            for (path, _), result in zip(chunk, decoded, strict=True):
                if isinstance(result, str):
                    skipped.append((files.url(path), result))
                else:
                    pixels.append(result)
                    names.append(files.class_of(path))
            bar.update(len(chunk))
    if not pixels:
        raise _no_images(source, files.paths)
    classes = tuple(sorted(set(names)))
    index = {name: i for i, name in enumerate(classes)}
    return ImageSet(
        pixels=np.stack(pixels),
        labels=np.array([index[name] for name in names], dtype=np.int64),
        classes=classes,
        skipped=tuple(skipped),
        source=source,
    )


def _fetched(files: _Files) -> Iterator[list[tuple[str, bytes | Exception]]]:
    for start in range(0, len(files.paths), FETCH_AT_ONCE):
        chunk = list(files.paths[start : start + FETCH_AT_ONCE])
        content = files.fs.cat(chunk, on_error="return")
        yield [(path, content[path]) for path in chunk]


def _decode_or_reason(
    item: tuple[str, bytes | Exception], image_size: int, channels: int, crop: str
) -> np.ndarray | str:
    path, data = item
    if isinstance(data, Exception):
        return f"cannot be read: {data}"
    try:
        return decode_image(data, image_size, channels, crop)
    # Pillow's plugins raise nearly anything on damaged files (SyntaxError and
    # struct.error among them); one bad file must not end the preparation.
    except Exception as error:
        reason = str(error).replace(repr(path), "").strip() or type(error).__name__
        return "not an image" if "cannot identify" in reason else reason


def _opens(path: str) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:
        return False


def _no_images(source: str, paths: tuple[str, ...]) -> SourceError:
    kinds = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in paths)
    found = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))
    return SourceError(
        f"none of the {len(paths)} files in {source!r} is an image that can be read "
        f"(found: {found}): give a folder of class folders of images"
    )


def _is_remote(source: str) -> bool:
    return "://" in source or "::" in source


def _from_package(name: str, entry: dict[str, Any], image_size: int, channels: int) -> ImageSet:
    images, labels = _package_arrays(entry)
    chosen = images[labels == entry["package"]["label"]]
    size = (image_size, image_size)
    pixels = np.stack(
        [np.asarray(Image.fromarray(a).resize(size, Image.Resampling.BICUBIC)) for a in chosen]
    )
    pixels = np.repeat(pixels[..., None], channels, axis=-1)
    classes = tuple(entry["classes"])
    return ImageSet(pixels, np.zeros(len(pixels), dtype=np.int64), classes, source=name)


def _package_arrays(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    package = entry["package"]
    images, labels = (
        _ArrayUnpickler(
            io.BytesIO(
                gzip.decompress(
                    manifest.package_file(
                        package["name"], package[part]["path"], package[part]["sha256"]
                    )
                )
            )
        ).load()
        for part in ("images", "labels")
    )
    return images, labels


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
