"""Decode once: the images of a source as one array, in a folder that is opened again.

    index.json          what was prepared, the SHA-256 of each shard, what was skipped
    pixels-1f2e3d.npy   uint8, N x H x W x C: all images, mapped into memory by whoever opens them
    shard_0007.npy      uint8, n x H x W x C: some of them
    shard_0007.json     which files those are; written last, so its presence says "done"

A shard depends on nothing but its own files. So any number of processes can
make shards at once, an interrupted preparation goes on with those that are
missing, and two that are made twice are equal. On this machine the shards go
once they are put together; in a folder elsewhere they stay, and each machine
puts them together in a cache of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from gan_lib.base.addresses import local_cache
from gan_lib.base.errors import SourceError
from gan_lib.base.storage import Folder
from gan_lib.data.decoding import Box, decode_image, read_boxes
from gan_lib.sources import manifest
from gan_lib.sources.fetching import Unread, fetch_files
from gan_lib.sources.listing import list_files
from gan_lib.sources.manifest import fetched_folder
from gan_lib.sources.source import Listing, Source, find_source

# Raised when other pixels come out of the same files, or other shards: what was prepared before
# is not opened.
FORMAT = 5
INDEX = "index.json"
# A source is cut into so many shards, for as many workers and for going on where it stopped ...
SHARDS = 64
# ... but a shard is never so small that it is all overhead (in bytes of files, of which each
# costs as much as so many bytes more), nor so large that it fills a worker (in bytes of pixels).
SMALLEST_SHARD, COST_OF_FILE = 6 * 2**20, 8 * 2**10
LARGEST_SHARD = 64 * 2**20
# What reading an index, or what is said of a shard, raises if it is not there or damaged.
_UNUSABLE = (FileNotFoundError, ValueError, KeyError, TypeError)
# What an index says is not believed: a shard has a name of this form, or is not opened.
_SHARD = re.compile(r"shard_\d{4,}\.npy")
# Shards read and checked at the same time, as they are put together.
_AT_ONCE = 8


@dataclass(frozen=True)
class Work:
    """What makes one shard.

    Attributes:
        number: of the shard.
        source: where the files are.
        paths: of the files, below the root.
        sizes: of the files, in bytes.
        image_size: pixels per side.
        channels: 1 or 3.
        crop: as in `decode_image`.
        annotations: where the boxes are, if they are wanted.
        annotation_paths: of each file's boxes; empty where there are none.
        annotation_sizes: in bytes.
    """

    number: int
    source: Source
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    image_size: int
    channels: int
    crop: str
    annotations: Source | None = None
    annotation_paths: tuple[str, ...] = ()
    annotation_sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of the shard's files, without their endings."""
        return f"shard_{self.number:04d}"


def cut_into_shards(
    files: Listing, image_size: int, channels: int, crop: str, annotations: Listing | None = None
) -> list[Work]:
    """The work that makes the shards of these files; the same for the same files."""
    n = len(files.paths)
    n_shards = min(SHARDS, -(-(sum(files.sizes) + n * COST_OF_FILE) // SMALLEST_SHARD))
    n_shards = max(n_shards, -(-n * image_size * image_size * channels // LARGEST_SHARD))
    # As even as they can be: who makes the last one should not be waited for.
    starts = np.linspace(0, n, min(n, n_shards) + 1).round().astype(int).tolist()
    boxes: list[tuple[str, int]] = [("", 0)] * n
    if annotations is not None:
        by_image = {
            os.path.splitext(path)[0]: (f"{annotations.source.root}/{path}", size)
            for path, size in zip(annotations.paths, annotations.sizes, strict=True)
        }
        boxes = [by_image.get(os.path.splitext(path)[0], ("", 0)) for path in files.paths]
    works = []
    for number, (start, stop) in enumerate(pairwise(starts)):
        part = slice(start, stop)
        work = Work(
            number, files.source, files.paths[part], files.sizes[part],
            image_size, channels, crop,
        )  # fmt: skip
        if annotations is not None:
            work = replace(
                work,
                annotations=annotations.source,
                annotation_paths=tuple(path for path, _ in boxes[part]),
                annotation_sizes=tuple(size for _, size in boxes[part]),
            )
        works.append(work)
    return works


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
    except _UNUSABLE:
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
        return info if _read_shard(folder, info) is not None else None
    # An object store keeps an object whole, and `finish` reads it.
    return info if folder.size(info["file"]) == info["bytes"] else None


def _make_shard(work: Work, folder: Folder, sharing: int) -> dict[str, Any]:
    shape = (len(work.paths), work.image_size, work.image_size, work.channels)
    pixels = np.empty(shape, np.uint8)
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
    parts = _npy_header(kept_pixels.shape), kept_pixels.reshape(-1).data
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
    there = [i for i, path in enumerate(work.annotation_paths) if path]
    found: dict[int, Box | str] = {}
    paths = [work.annotation_paths[i] for i in there]
    fetched = fetch_files(work.annotations, paths, [work.annotation_sizes[i] for i in there])
    for i, data in zip(there, fetched, strict=True):
        try:
            found[i] = data if isinstance(data, str) else read_boxes(data)[0]
        except ValueError as error:
            found[i] = str(error)
    return [found.get(i, "no annotated box") for i in range(len(work.paths))]


def _decode(work: Work, data: bytes, box: Box | str | None) -> np.ndarray | str:
    known = None if isinstance(box, str) else box
    try:
        pixels = decode_image(data, work.image_size, work.channels, work.crop, known)
    # Pillow's plugins raise nearly anything on damaged files (SyntaxError and
    # struct.error among them); one bad file must not end the preparation.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return "not an image" if "cannot identify" in reason else reason
    # What is no image is told so, whether or not it has a box.
    return box if isinstance(box, str) else pixels


def make_index(
    files: Listing, shards: Sequence[dict[str, Any]], told: Mapping[str, Any]
) -> dict[str, Any]:
    """What index.json says of a preparation.

    Args:
        files: that were prepared.
        shards: what `make_shard` returned, in order.
        told: goes into the index as it is; `max_images` of it are kept, if it is not 0.
    """
    names = [files.class_of(path) for shard in shards for path in shard["paths"]]
    names = names[: told["max_images"] or None]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    unread = [pair for shard in shards for pair in shard["unread"]]
    skipped = [*files.skipped, *(pair for shard in shards for pair in shard["skipped"]), *unread]
    return {
        "format": FORMAT,
        **told,
        "count": len(names),
        "files": len(files.paths) + len(files.skipped),
        "classes": classes,
        # Files are sorted, so a class comes in few runs: pairs of label and length.
        "labels": [(number[name], len(list(run))) for name, run in groupby(names)],
        "shards": [
            {key: shard[key] for key in ("file", "count", "bytes", "sha256")}
            for shard in shards
            if shard["count"]
        ],
        "skipped": [(files.source.shown(path), why) for path, why in sorted(map(tuple, skipped))],
        # So many of them could not be read, and are worth another try.
        "unread": len(unread),
    }


def finish(folder: Folder, index: dict[str, Any]) -> None:
    """Put the shards together, and write the index that says so.

    Raises:
        SourceError: if shards are damaged, which then count as not done.
    """
    try:
        open_pixels(folder, index)
    except SourceError:
        for shard in index["shards"]:
            if _read_shard(folder, shard) is None:
                folder.remove(shard["file"].replace(".npy", ".json"))
        raise
    # A folder with an index is whole, also after a loss of power: so are the pixels by now.
    folder.write(INDEX, json.dumps(index, indent=1).encode())
    # Another call tries the files again that could not be read, and needs the shards for it.
    if folder.is_local and not index["unread"]:
        for name in folder.names(""):
            ours = name.startswith(("shard_", "pixels-")) and not name.endswith(".part")
            if ours and name != _pixels_name(index):
                folder.remove(name)


def read_index(folder: Folder) -> dict[str, Any] | None:
    """The index of a preparation; None if there is none that can be used."""
    try:
        index = json.loads(folder.read(INDEX))
        ours = all(_SHARD.fullmatch(shard["file"]) for shard in index["shards"])
        return index if ours and index["format"] == FORMAT else None
    except _UNUSABLE:
        return None


def checksum(index: Mapping[str, Any]) -> str:
    """SHA-256 that is equal for equal pixels and labels, if they lie in equal shards."""
    return hashlib.sha256(json.dumps([index["shards"], index["labels"]]).encode()).hexdigest()


def _pixels_name(index: Mapping[str, Any]) -> str:
    # Pixels of another index have another name, so an old copy is never taken for them.
    return f"pixels-{checksum(index)[:32]}.npy"


def open_pixels(folder: Folder, index: dict[str, Any]) -> np.ndarray:
    """All images: uint8, N x H x W x C, mapped into memory and not to be written to.

    From shards they are put together first, in the folder, or in this machine's cache if the
    folder is elsewhere.

    Raises:
        SourceError: if a shard that is needed for it is not what the index says.
    """
    if not folder.is_local:
        Folder(local_cache()).make_private()
    home = folder if folder.is_local else Folder(os.path.join(local_cache(), "copies"))
    name = _pixels_name(index)
    shape = (index["count"], index["image_size"], index["image_size"], index["channels"])
    pixels = _mapped(f"{home.root}/{name}", shape)
    if pixels is None:
        with home.locked(f"{name}.lock", name):
            # Another process may have done it meanwhile.
            if _mapped(f"{home.root}/{name}", shape) is None:
                home.write(name, _together(folder, index["shards"], shape))
        pixels = _mapped(f"{home.root}/{name}", shape)
    assert pixels is not None
    return pixels


def _mapped(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array in a file; None if it is not there, or not whole."""
    try:
        found = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    # As a plain array: indexing a memmap makes a memmap, at ten times the cost.
    return np.asarray(found) if (found.shape, found.dtype) == (shape, np.uint8) else None


def _together(
    folder: Folder, shards: Sequence[dict[str, Any]], shape: tuple[int, ...]
) -> Iterator[bytes | memoryview]:
    """A .npy file of the pixels of all shards, part by part."""

    def read(shard: Mapping[str, Any]) -> memoryview | None:
        own_shape = (shard["count"], *shape[1:])
        if folder.is_local:
            # Made just now, or looked at before.
            pixels = _mapped(f"{folder.root}/{shard['file']}", own_shape)
            return None if pixels is None else pixels.reshape(-1).data
        data = _read_shard(folder, shard)
        return None if data is None else memoryview(data)[len(_npy_header(own_shape)) :]

    yield _npy_header(shape)
    left, damaged = math.prod(shape), []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(shards), _AT_ONCE):
            some = shards[start : start + _AT_ONCE]
            for shard, pixels in zip(some, pool.map(read, some), strict=True):
                if pixels is None:
                    damaged.append(shard["file"])
                else:
                    yield pixels[: max(left, 0)]
                    left -= len(pixels)
    if damaged or left > 0:
        raise SourceError(
            f"the prepared images at {folder.url} are damaged ({', '.join(damaged[:3]) or INDEX}): "
            "call prepare_images again with the same source and cache, which makes them anew"
        )


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    told = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()


def _read_shard(folder: Folder, shard: Mapping[str, Any]) -> bytes | None:
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
        try:
            return list_files(place)
        except SourceError:
            continue
    raise SourceError(
        f"crop 'box' needs the annotated boxes of {source}, and there are none at "
        f"{' or '.join(place.url for place in places[:2])}: put them there (those of Stanford "
        "Dogs come by `python -m gan_lib data fetch --archive annotation`), or use crop 'center'"
    )
