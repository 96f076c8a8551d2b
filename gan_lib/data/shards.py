"""Shards: some files of a source each, decoded by whoever has time; see gan_lib.data.prepared.

A shard depends on nothing but its own files. So any number of processes can
make shards at once, an interrupted preparation goes on with those that are
missing, and two that are made twice are equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from gan_lib.base.checks import check_type, require_choice, require_range
from gan_lib.base.errors import SourceError
from gan_lib.base.storage import Folder
from gan_lib.data.decoding import Box, decode_image, read_boxes
from gan_lib.parameters import CROPS
from gan_lib.sources import manifest
from gan_lib.sources.fetching import Unread, fetch_files
from gan_lib.sources.listing import list_files
from gan_lib.sources.manifest import fetched_folder
from gan_lib.sources.source import Listing, Source, find_source

# A source is cut into so many shards, for as many workers and for going on where it stopped ...
SHARDS = 64
# ... but a shard is never so small that it is all overhead (in bytes of files, of which each
# costs as much as so many bytes more), nor so large that it fills a worker (in bytes of pixels).
SMALLEST_SHARD, COST_OF_FILE = 6 * 2**20, 8 * 2**10
LARGEST_SHARD = 64 * 2**20
# What reading an index, or what is said of a shard, raises if it is not there or damaged.
UNUSABLE = (FileNotFoundError, ValueError, KeyError, TypeError)
# Shards read and checked at the same time.
AT_ONCE = 8


@dataclass(frozen=True)
class ImageRecipe:
    """How files become images of one size; the values are those of `prepare_images`.

    Raises:
        ParameterError: if a value has the wrong type or cannot be.
    """

    image_size: int
    channels: int = 3
    crop: str = "center"
    max_images: int = 0

    def __post_init__(self) -> None:
        require_range("image_size", check_type("image_size", int, self.image_size), 1, None)
        require_choice("channels", self.channels, (1, 3))
        require_choice("crop", self.crop, CROPS)
        require_range("max_images", check_type("max_images", int, self.max_images), 0, None)


@dataclass(frozen=True)
class Work:
    """What makes one shard.

    Attributes:
        number: of the shard.
        source: where the files are.
        paths: of the files, below the source.
        sizes: of the files, in bytes.
        recipe: what is made of each.
        annotations: where the boxes are, if they are wanted.
        annotated: for each file that has boxes its place in `paths`, and the path and the bytes
            of its boxes.
    """

    number: int
    source: Source
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    recipe: ImageRecipe
    annotations: Source | None = None
    annotated: tuple[tuple[int, str, int], ...] = ()

    @property
    def name(self) -> str:
        """Of the shard's files, without their endings."""
        return f"shard_{self.number:04d}"


def cut_into_shards(
    files: Listing, recipe: ImageRecipe, annotations: Listing | None = None, first: int = 0
) -> list[Work]:
    """The work that makes the shards of these files, numbered from `first`; always the same."""
    n = len(files.paths)
    n_shards = min(SHARDS, -(-(sum(files.sizes) + n * COST_OF_FILE) // SMALLEST_SHARD))
    n_shards = max(n_shards, -(-n * recipe.image_size**2 * recipe.channels // LARGEST_SHARD))
    # As even as they can be: who makes the last one should not be waited for.
    starts = np.linspace(0, n, min(n, n_shards) + 1).round().astype(int).tolist()
    works = [
        Work(number, files.source, files.paths[start:stop], files.sizes[start:stop], recipe)
        for number, (start, stop) in enumerate(pairwise(starts), first)
    ]
    if annotations is None:
        return works
    boxes = {
        os.path.splitext(path)[0]: (f"{annotations.source.root}/{path}", size)
        for path, size in zip(annotations.paths, annotations.sizes, strict=True)
    }
    return [
        replace(
            work,
            annotations=annotations.source,
            annotated=tuple(
                (i, *boxes[stem])
                for i, stem in enumerate(os.path.splitext(path)[0] for path in work.paths)
                if stem in boxes
            ),
        )
        for work in works
    ]


def make_shard(work: Work, url: str, sharing: int = 1) -> dict[str, Any] | SourceError:
    """Read, decode and store one shard, unless it is there already.

    Args:
        work: what to read.
        url: the folder of the preparation.
        sharing: how many make shards on this machine at the same time, and share its cores.

    Returns:
        The content of the shard's .json; or the error, if the source can no longer be
        read. (Returned, because Dask logs what a task raises, with its arguments.)
    """
    folder = Folder(url)
    try:
        return finished_shard(folder, work) or _make_shard(work, folder, sharing)
    except SourceError as error:
        return error


def shard_info(folder: Folder, work: Work) -> dict[str, Any] | None:
    """The content of a shard's .json, if the shard has all of its files."""
    try:
        info = json.loads(folder.read(f"{work.name}.json"))
        # Files that could not be read are in neither.
        files = sorted([*info["paths"], *(path for path, _ in info["skipped"])])
    except UNUSABLE:
        return None
    ours = files == sorted(work.paths) and info.get("file") == f"{work.name}.npy"
    return info if ours else None


def finished_shard(folder: Folder, work: Work) -> dict[str, Any] | None:
    """The content of a shard's .json, if the shard has all of its files and is undamaged."""
    info = shard_info(folder, work)
    if info is None:
        return None
    if folder.is_local:
        # A loss of power may have taken what was not yet on the disk.
        return info if read_shard(folder, info) is not None else None
    # An object store keeps an object whole, and `finish` reads it.
    return info if folder.size(info["file"]) == info["bytes"] else None


def _make_shard(work: Work, folder: Folder, sharing: int) -> dict[str, Any]:
    side = work.recipe.image_size
    pixels = np.empty((len(work.paths), side, side, work.recipe.channels), np.uint8)
    kept: list[str] = []
    skipped: list[tuple[str, str]] = []
    unread: list[tuple[str, str]] = []
    boxes = _boxes(work)
    with warnings.catch_warnings():
        # What is wrong with a file is the reason why it is skipped, or does not matter here.
        warnings.filterwarnings("ignore", module="PIL")
        decoded = fetch_files(
            work.source,
            [f"{work.source.root}/{path}" for path in work.paths],
            work.sizes,
            lambda data, place: _decode(work, data, boxes[place]),
            threads=max(1, CPU_COUNT // sharing),
        )
        for path, result in zip(work.paths, decoded, strict=True):
            if isinstance(result, str):
                (unread if isinstance(result, Unread) else skipped).append((path, result))
            else:
                pixels[len(kept)] = result
                kept.append(path)
    kept_pixels = pixels[: len(kept)]
    parts = npy_header(kept_pixels.shape), kept_pixels.reshape(-1).data
    digest = hashlib.sha256(parts[0])
    digest.update(parts[1])
    # Waiting for the disk, shard by shard, took a fifth of the time: it is done once, for all.
    folder.write(f"{work.name}.npy", parts, durable=False)
    info = {
        "file": f"{work.name}.npy",
        "count": len(kept),
        "bytes": sum(map(len, parts)),
        "sha256": digest.hexdigest(),
        "paths": kept,
        "skipped": skipped,
        "unread": unread,
    }
    folder.write(f"{work.name}.json", json.dumps(info).encode(), durable=False)
    return info


def _boxes(work: Work) -> Sequence[Box | str | None]:
    """The first annotated box of each file, or the reason why it has none; None if none is asked.

    Of the 20,580 Stanford Dogs some 1,400 have more boxes, for more dogs. One image is
    made of each photograph, so that the official counts hold.
    """
    if work.annotations is None:
        return [None] * len(work.paths)
    found: dict[int, Box | str] = {}
    sizes = [size for _, _, size in work.annotated]
    fetched = fetch_files(work.annotations, [path for _, path, _ in work.annotated], sizes)
    for (i, _, _), data in zip(work.annotated, fetched, strict=True):
        try:
            found[i] = data if isinstance(data, str) else read_boxes(data)[0]
        except ValueError as error:
            found[i] = str(error)
    return [found.get(i, "no annotated box") for i in range(len(work.paths))]


def _decode(work: Work, data: bytes, box: Box | str | None) -> np.ndarray | str:
    known = None if isinstance(box, str) else box
    try:
        recipe = work.recipe
        pixels = decode_image(data, recipe.image_size, recipe.channels, recipe.crop, known)
    # Pillow's plugins raise nearly anything on damaged files (SyntaxError and
    # struct.error among them); one bad file must not end the preparation.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return "not an image" if "cannot identify" in reason else reason
    # What is no image is told so, whether or not it has a box.
    return box if isinstance(box, str) else pixels


def npy_header(shape: tuple[int, ...]) -> bytes:
    """How a .npy file of so many pixels begins: uint8, in the order of C."""
    header = io.BytesIO()
    told = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()


def read_shard(folder: Folder, shard: Mapping[str, Any]) -> bytes | None:
    """The bytes of a shard's file; None if they are not those that the index names."""
    try:
        data = folder.read(shard["file"])
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == shard["sha256"] else None


def list_annotations(source: Source, annotation: str | None) -> Listing:
    """The annotations of a source: those given, or the folder `Annotation` beside or in it.

    Raises:
        SourceError: if there are none.
    """
    if annotation is not None:
        return list_files(find_source(annotation, source.options))
    places = [source.beside("Annotation"), replace(source, url=f"{source.url}/Annotation")]
    if source.name in manifest.sources():
        places.append(Source(source.name, str(fetched_folder(source.name, "annotation"))))
    for place in places:
        with contextlib.suppress(SourceError):
            return list_files(place)
    raise SourceError(
        f"crop 'box' needs the annotated boxes of {source}, and there are none at "
        f"{' or '.join(place.url for place in places[:2])}: put them there (those of Stanford "
        "Dogs come by `python -m gan_lib data fetch --archive annotation`), or use crop 'center'"
    )
