"""Decode once: the images of a source as one array, in a folder that is opened again.

    index.json          what was prepared, the SHA-256 of each shard, what was skipped
    pixels-1f2e3d.npy   uint8, N x H x W x C: all images, mapped into memory by whoever opens them
    shard_0007.npy      uint8, n x H x W x C: some of them
    shard_0007.json     which files those are; written last, so its presence says "done"

On this machine the shards go once they are put together; in a folder elsewhere
they stay, and each machine puts them together in a cache of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np

from gan_lib.base.addresses import local_cache
from gan_lib.base.errors import SourceError
from gan_lib.base.storage import Folder
from gan_lib.data.shards import AT_ONCE, UNUSABLE, npy_header, read_shard
from gan_lib.sources.source import Listing

# Raised when other pixels come out of the same files, or other shards: what was prepared before
# is not opened.
FORMAT = 5
INDEX = "index.json"
# What an index says is not believed: a shard has a name of this form, or is not opened.
_SHARD = re.compile(r"shard_\d{4,}\.npy")


def make_index(
    files: Listing, shards: Sequence[dict[str, Any]], told: Mapping[str, Any]
) -> dict[str, Any]:
    """What index.json says of files that were prepared, and what `make_shard` made of them.

    `told` goes into the index as it is; `max_images` of it are kept, if it is not 0.
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
            if read_shard(folder, shard) is None:
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
    except UNUSABLE:
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
        data = read_shard(folder, shard)
        return None if data is None else memoryview(data)[len(npy_header(own_shape)) :]

    yield npy_header(shape)
    left, damaged = math.prod(shape), []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(shards), AT_ONCE):
            some = shards[start : start + AT_ONCE]
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


@contextmanager
def in_one_sentence(url: str) -> Iterator[None]:
    """What a disk or a store raises becomes a SourceError about the cache."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"the prepared images cannot be written to {url}, or read from there: {error}. Name a "
            "place that can be written as cache= or in the environment variable GAN_LIB_CACHE, or "
            "make room"
        ) from None
