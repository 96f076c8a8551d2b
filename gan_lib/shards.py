"""Decode once: the images of a source as shards of pixels, in a folder that is opened again.

    index.json          what was prepared, the SHA-256 of each shard, what was skipped
    shard_0007.npy      uint8, n x H x W x C
    shard_0007.json     which files those are; written last, so its presence says "done"

A shard depends on nothing but its own files. So any number of processes can
make shards at once, an interrupted preparation goes on with those that are
missing, and two that are made twice are equal.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from threading import BoundedSemaphore
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from gan_lib import manifest
from gan_lib.decoding import Box, decode_image, read_boxes
from gan_lib.downloading import fetched_folder
from gan_lib.errors import SourceError
from gan_lib.fetching import fetch_files
from gan_lib.listing import Listing, Source, find_source, list_files
from gan_lib.storage import Folder, local_cache

# Raised when other pixels come out of the same files, or other shards: what was prepared before
# is not opened.
FORMAT = 4
INDEX = "index.json"
# A source is cut into so many shards, for as many workers and for going on where it stopped ...
SHARDS = 64
# ... but a shard is never so small that it is all overhead (in bytes of files, of which each
# costs as much as so many bytes more), nor so large that it fills a worker (in bytes of pixels).
SMALLEST_SHARD, COST_OF_FILE = 6 * 2**20, 8 * 2**10
LARGEST_SHARD = 64 * 2**20

# Images decoded at the same time, per process: more than there are cores would take no less
# time, and 100 MB more for each large photograph. A worker may have more threads than that.
_DECODERS = BoundedSemaphore(CPU_COUNT)


@dataclass(frozen=True)
class Work:
    """What makes one shard.

    Attributes:
        number: of the shard.
        source: where the files are.
        root: the source's folder, as its file system names it.
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
    root: str
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
            os.path.splitext(path)[0]: (f"{annotations.root}/{path}", size)
            for path, size in zip(annotations.paths, annotations.sizes, strict=True)
        }
        boxes = [by_image.get(os.path.splitext(path)[0], ("", 0)) for path in files.paths]
    works = []
    for number, (start, stop) in enumerate(pairwise(starts)):
        part = slice(start, stop)
        work = Work(
            number, files.source, files.root, files.paths[part], files.sizes[part],
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
    with folder.locked(f"{work.name}.lock", f"{work.name}.*"):
        done = finished_shard(folder, work)
        if done is not None:
            return done
        # What says "done" of a damaged shard is not to be believed while it is made again.
        folder.remove(f"{work.name}.json")
        try:
            return _make_shard(work, folder, sharing)
        except SourceError as error:
            return error


def shard_info(folder: Folder, work: Work) -> dict[str, Any] | None:
    """The content of a shard's .json; None if the shard is not done."""
    try:
        return json.loads(folder.read(f"{work.name}.json"))
    except (FileNotFoundError, ValueError):
        return None


def finished_shard(folder: Folder, work: Work) -> dict[str, Any] | None:
    """The content of a shard's .json, if the shard is complete and undamaged."""
    info = shard_info(folder, work)
    if info is None:
        return None
    if not folder.is_local:
        # An object store keeps an object whole, and reading it may cross a network.
        return info if folder.size(f"{work.name}.npy") == info["bytes"] else None
    try:
        # A loss of power may have taken what was not yet on the disk.
        found = hashlib.sha256(folder.read(f"{work.name}.npy")).hexdigest()
    except FileNotFoundError:
        return None
    return info if found == info["sha256"] else None


def _make_shard(work: Work, folder: Folder, sharing: int) -> dict[str, Any]:
    shape = (len(work.paths), work.image_size, work.image_size, work.channels)
    pixels = np.empty(shape, np.uint8)
    kept: list[str] = []
    skipped: list[tuple[str, str]] = []
    boxes = _boxes(work)
    with warnings.catch_warnings():
        # What is wrong with a file is the reason why it is skipped, or does not matter here.
        warnings.filterwarnings("ignore", module="PIL")
        decoded = fetch_files(
            work.source,
            [f"{work.root}/{path}" for path in work.paths],
            work.sizes,
            lambda data, place: _decode(work, data, boxes[place]),
            threads=max(1, CPU_COUNT // sharing),
        )
        for path, result in zip(work.paths, decoded, strict=True):
            if isinstance(result, str):
                skipped.append((path, result))
            else:
                pixels[len(kept)] = result
                kept.append(path)
    buffer = io.BytesIO()
    np.save(buffer, pixels[: len(kept)])
    data = buffer.getvalue()
    # Waiting for the disk, shard by shard, took a fifth of the time: `write_index` does it once.
    folder.write(f"{work.name}.npy", data, durable=False)
    info = {
        "file": f"{work.name}.npy",
        "count": len(kept),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "paths": kept,
        "skipped": skipped,
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
        with _DECODERS:
            pixels = decode_image(data, work.image_size, work.channels, work.crop, known)
    # Pillow's plugins raise nearly anything on damaged files (SyntaxError and
    # struct.error among them); one bad file must not end the preparation.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return "not an image" if "cannot identify" in reason else reason
    # What is no image is told so, whether or not it has a box.
    return box if isinstance(box, str) else pixels


def write_index(
    folder: Folder, files: Listing, shards: Sequence[dict[str, Any]], told: dict[str, Any]
) -> dict[str, Any]:
    """Finish a preparation: what there is, in index.json.

    Args:
        folder: of the preparation.
        files: that were prepared.
        shards: what `make_shard` returned, in order.
        told: goes into the index as it is.

    Returns:
        The index.
    """
    names = [files.class_of(path) for shard in shards for path in shard["paths"]]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    fs, _ = files.source.open()
    skipped = [*files.skipped, *(pair for shard in shards for pair in shard["skipped"])]
    index = {
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
        "skipped": [
            (files.source.clean(fs.unstrip_protocol(f"{files.root}/{path}")), why)
            for path, why in sorted(map(tuple, skipped))
        ],
    }
    # A folder with an index is whole, also after a loss of power.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(folder.flush, [shard["file"] for shard in index["shards"]]))
    folder.write(INDEX, json.dumps(index, indent=1).encode())
    return index


def read_index(folder: Folder) -> dict[str, Any] | None:
    """The index of a finished preparation; None if there is none, or a shard of it is missing."""
    try:
        index = json.loads(folder.read(INDEX))
    except (FileNotFoundError, ValueError):
        return None
    if index.get("format") != FORMAT:
        return None
    # Elsewhere each shard is checked when it is copied here.
    checked = index["shards"] if folder.is_local else []
    whole = all(folder.size(shard["file"]) == shard["bytes"] for shard in checked)
    return index if whole else None


def open_shards(folder: Folder, index: dict[str, Any]) -> ShardedPixels:
    """Map the shards into memory; from elsewhere they are first copied to this machine's cache.

    Raises:
        SourceError: if a copy is not what the index says.
    """
    if not folder.is_local:
        Folder(local_cache()).make_private()
        copy = Folder(os.path.join(local_cache(), "copies", os.path.basename(folder.root)))
        with copy.locked("copying.lock", "*"), ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda shard: _copy_shard(folder, copy, shard), index["shards"]))
        folder = copy
    return ShardedPixels(
        [np.load(f"{folder.root}/{s['file']}", mmap_mode="r") for s in index["shards"]]
    )


def _copy_shard(folder: Folder, copy: Folder, shard: dict[str, Any]) -> None:
    if copy.size(shard["file"]) == shard["bytes"]:
        return
    data = folder.read(shard["file"])
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise SourceError(
            f"{folder.url}/{shard['file']} is damaged: its SHA-256 is not that of the index. "
            "Delete the file, and prepare the images again"
        )
    copy.write(shard["file"], data)


def damaged_shards(folder: Folder, index: dict[str, Any]) -> list[str]:
    """The shards whose bytes are not those that the index names."""
    found = []
    for shard in index["shards"]:
        try:
            data = folder.read(shard["file"])
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            found.append(shard["file"])
    return found


class ShardedPixels:
    """Several arrays of images as one: uint8, N x H x W x C.

    It has the shape of an array and is indexed like one along its first axis;
    `numpy.asarray` copies it into memory.

    Args:
        shards: arrays of equal H x W x C; usually memory maps.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        # As plain arrays: indexing a memmap makes a memmap, at ten times the cost.
        self._shards = [np.asarray(shard) for shard in shards]
        self._stops = np.cumsum([len(shard) for shard in self._shards])
        self.dtype = self._shards[0].dtype
        self.shape = (int(self._stops[-1]), *self._shards[0].shape[1:])
        self.ndim = len(self.shape)
        self.nbytes = sum(shard.nbytes for shard in self._shards)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self._shards:
            yield from shard

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._shards).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return self[np.array([key])][0]
        if isinstance(key, slice):
            key = np.arange(*key.indices(len(self)))
        indices = np.asarray(key)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        if len(indices) and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"an index is outside the {len(self)} images")
        indices = indices.astype(np.int64) % len(self)
        numbers = np.searchsorted(self._stops, indices, side="right")
        rows = indices - np.append(0, self._stops)[numbers]
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        # An image is some kilobytes in one piece: a plain loop copies as fast as memory allows.
        for i, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            out[i] = self._shards[number][row]
        return out


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
