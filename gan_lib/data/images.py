"""Files -> arrays: any folder of images, local or remote, prepared once and then read from memory.

A GAN at 64 pixels sees each image hundreds of times, and the whole of Stanford
Dogs is 253 MB as uint8. So every image is read, decoded, cut and resized once,
by all workers of a cluster if there is one; training then reads memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gan_lib.base.addresses import absolute, cache_home, prepared_cache
from gan_lib.base.errors import ParameterError, SourceError
from gan_lib.base.interrupts import interruptible
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import Folder
from gan_lib.data.image_set import ImageSet, evenly_spread, open_prepared
from gan_lib.data.prepared import (
    FORMAT,
    finish,
    in_one_sentence,
    make_index,
    open_pixels,
    read_index,
)
from gan_lib.data.shards import (
    AT_ONCE,
    ImageRecipe,
    Work,
    cut_into_shards,
    finished_shard,
    list_annotations,
    make_shard,
    shard_info,
)
from gan_lib.sources import manifest
from gan_lib.sources.embedded import package_images
from gan_lib.sources.listing import list_files, look_at
from gan_lib.sources.source import Listing, find_source, no_images

if TYPE_CHECKING:
    from distributed import Client

# The shards as they are done, each with what `make_shard` returned.
_Made = Generator[tuple[Work, dict[str, Any] | SourceError], None, None]
# The shards of files, of which the first has this number, as `make_shard` returns them.
_Make = Callable[[Listing, int], list[dict[str, Any]]]
# A source of which a larger part is no image is hardly the one that was meant.
MUCH = 0.1
# Files that are read at least to make up for some that are no images.
SPARE = 8


class SkippedFilesWarning(UserWarning):
    """More than a tenth of a source's files could not be used, or some could not be read."""


class CacheNotSharedError(SourceError):
    """A worker does not see the folder in which the images are to be prepared."""


@interruptible()
def prepare_images(
    source: str,
    image_size: int,
    channels: int = 3,
    crop: str = "center",
    max_images: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    client: Client | None = None,
    cache: str | None = None,
    annotation: str | None = None,
) -> ImageSet:
    """Bring every image of a source to one size, once; the same call again opens the result.

    It is made anew when a file of the source is another, and an interrupted
    preparation goes on where it stopped.

    Args:
        source: a name in data_manifest.json, or a folder (a path or any fsspec URL)
            of class folders. Images right in the folder make one class.
        image_size: pixels per side of the result.
        channels: 1 for grey, 3 for RGB.
        crop: "center" scales the shorter side and cuts the middle out; "squash" scales
            both sides and keeps everything; "box" cuts a square around the first
            annotated box of each image.
        max_images: prepare this many, spread over all; 0 means all. For files that are no
            images as many others are taken, spread over those that are left, and come last.
        storage_options: passed to the fsspec file system, e.g. `{"anon": True}` for S3.
        progress: show a progress bar, and what was skipped.
        client: of a Dask cluster, whose workers do it; None does it here, on all cores.
        cache: the folder that keeps the result, a path or an object store that the workers
            reach too; None takes the environment variable GAN_LIB_CACHE, or ~/.cache/gan_lib.
        annotation: folder of PASCAL VOC files, for "box"; None looks for a folder
            `Annotation` beside the source or in it.

    Raises:
        SourceError: if the source is not there, not one image in it can be used, or
            the cache cannot be written.
        ParameterError: if a value has the wrong type or cannot be, or boxes are wanted of
            a source that has none.
        CacheNotSharedError: if a worker does not see the cache.
    """
    recipe = ImageRecipe(image_size, channels, crop, max_images)
    entry = manifest.sources().get(source)
    if entry is not None and "package" in entry:
        if crop == "box":
            raise ParameterError(f"crop is 'box', but {source!r} has no boxes: use 'center'")
        pixels = package_images(entry, image_size, channels)
        labels = np.zeros(len(pixels), dtype=np.int64)
        images = ImageSet(pixels, labels, tuple(entry["classes"]), source=source)
        return images.limited(max_images)
    place = find_source(source, storage_options)
    files = list_files(place)
    annotations = list_annotations(files.source, annotation) if crop == "box" else None
    told = {
        "source": place.url,
        **asdict(recipe),
        "fingerprint": [files.fingerprint, annotations.fingerprint if annotations else ""],
    }
    url = _place_in_cache(cache, source, told)
    folder = Folder(url)

    def make(some: Listing, first: int) -> list[dict[str, Any]]:
        works = cut_into_shards(some, recipe, annotations, first)
        return _make_shards(works, folder, client, progress)

    with in_one_sentence(url):
        index = _finished(folder)
        if index is None:
            Folder(absolute(cache) if cache is not None else cache_home()).make_private()
            waiting = "another process prepares these images: waiting for it" if progress else ""
            with folder.locked("preparing.lock", "*", waiting=waiting):
                index = _prepare(folder, files, told, make)
    images = open_prepared(url, index)
    _tell_what_was_skipped(images, index, progress)
    return replace(images, source=source)


def _finished(folder: Folder) -> dict[str, Any] | None:
    """The index of a preparation to which nothing is missing; None if there is none."""
    index = read_index(folder)
    if index is None or index["unread"]:
        return None
    try:
        open_pixels(folder, index)
    except SourceError:
        return None
    return index


def _prepare(folder: Folder, files: Listing, told: dict[str, Any], make: _Make) -> dict[str, Any]:
    """Make what is missing of a preparation, and return its index."""
    last = False
    while True:
        # Another process may have done it by now: this one waited, or the lock is not seen there.
        index = _finished(folder)
        if index is not None:
            return index
        tried, shards = _make_enough(files, told["max_images"], make)
        if not any(shard["count"] for shard in shards):
            found = [why for shard in shards for _, why in shard["skipped"] + shard["unread"]]
            raise no_images(tried, found)
        index = make_index(tried, shards, told)
        try:
            finish(folder, index)
            return index
        except SourceError:
            if last:
                raise
            last = True


def _make_enough(
    files: Listing, max_images: int, make: _Make
) -> tuple[Listing, list[dict[str, Any]]]:
    """The shards of all files, or of so many that `max_images` come out; and those files."""
    untried = np.arange(len(files.paths))
    tried: list[int] = []
    shards: list[dict[str, Any]] = []
    n = max_images or len(untried)
    while n > 0 and len(untried):
        chosen = evenly_spread(min(n, len(untried)), len(untried))
        some = untried[chosen].tolist()
        untried = np.delete(untried, chosen)
        tried += some
        shards += make(files.chosen(some), len(shards))
        # What could not be read is tried again by the next call, and needs no other in its place.
        n_made = sum(shard["count"] + len(shard["unread"]) for shard in shards)
        n = max_images - n_made
        if n > 0:
            # As many as will do if no more of them are images than before.
            n = max(SPARE, n * len(tried) // max(n_made, 1))
    return files.chosen(tried), shards


def _place_in_cache(cache: str | None, source: str, told: dict[str, Any]) -> str:
    home = absolute(cache) if cache is not None else prepared_cache()
    key = hashlib.sha256(json.dumps([FORMAT, told], sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:].lower()
    size, channels, crop = told["image_size"], told["channels"], told["crop"]
    return f"{home.rstrip('/')}/{name}-{size}x{size}x{channels}-{crop}-{key[:12]}"


def _make_shards(
    works: Sequence[Work], folder: Folder, client: Client | None, progress: bool
) -> list[dict[str, Any]]:
    """What `make_shard` returns for each, in order."""
    n_files = sum(len(work.paths) for work in works)
    done: dict[int, dict[str, Any]] = {}
    with ProgressBar(n_files, "preparing", "image", show=progress) as bar:
        there = set(folder.names(""))
        begun = [work for work in works if f"{work.name}.json" in there]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda work: finished_shard(folder, work), begun)
            for work, told in zip(begun, found, strict=True):
                if told is not None:
                    done[work.number] = told
                    bar.update(len(work.paths))
        missing = [work for work in works if work.number not in done]
        # Closed at once where it fails: the workers need not go on.
        with closing(
            _on_workers(client, missing, folder) if client else _here(missing, folder)
        ) as made:
            for work, info in made:
                if isinstance(info, SourceError):
                    raise info
                done[work.number] = info
                bar.update(len(work.paths))
    return [done[work.number] for work in works]


def _here(works: Sequence[Work], folder: Folder) -> _Made:
    # Otherwise this and other threads import Pillow's plugins together, with the first image: an
    # import that Ctrl-C interrupts may keep the lock of all imports, and the others wait for ever.
    Image.init()
    for work in works:
        yield work, make_shard(work, folder.url)


def _on_workers(client: Client, works: Sequence[Work], folder: Folder) -> _Made:
    from distributed import as_completed
    from distributed.comm.addressing import get_address_host

    from gan_lib.cluster.reach import failures, require_shared
    from gan_lib.cluster.shipping import ship_package

    if not works:
        return
    ship_package(client)
    for worker, why in failures(client, look_at, works[0].source).items():
        raise SourceError(f"the worker {worker} cannot read the images: {why}")
    require_shared(
        client,
        folder.url,
        "",
        lambda why: CacheNotSharedError(
            f"the cache cannot be used {why}. Name a place that all workers reach, such as "
            "s3://bucket/cache, as cache= or in the environment variable GAN_LIB_CACHE"
        ),
    )
    keys = [f"prepare-{work.name}-{uuid.uuid4().hex}" for work in works]
    on_host: Counter[str] = Counter()
    for address, n_threads in client.nthreads().items():
        on_host[get_address_host(address)] += n_threads
    sharing = max(on_host.values(), default=1)
    by_key = dict(zip(keys, works, strict=True))
    futures = []
    try:
        futures = client.map(
            make_shard, works, url=folder.url, sharing=sharing, key=keys, pure=False
        )
        for future in as_completed(futures, loop=client.loop):
            work = by_key[future.key]
            # The shard's own file says as much as the task's result, which would come through
            # three event loops.
            yield work, shard_info(folder, work) or future.result()
    finally:
        client.cancel(futures)


def _tell_what_was_skipped(images: ImageSet, index: dict[str, Any], progress: bool) -> None:
    if not images.skipped:
        return
    reasons = Counter(why for _, why in images.skipped).most_common(3)
    most = ", ".join(f"{n} x {why}" for why, n in reasons)
    line = (
        f"{len(images.skipped):,} of {index['files']:,} files skipped ({most}; "
        "all are in `skipped`, and listed by `python -m gan_lib data verify`), "
        f"{len(images):,} images prepared"
    )
    if index["unread"]:
        line += f"; the next call tries the {index['unread']:,} again that could not be read"
    if index["unread"] or len(images.skipped) > MUCH * index["files"]:
        warnings.warn(f"{images.source}: {line}", SkippedFilesWarning, stacklevel=4)
    elif progress:
        print(line)
