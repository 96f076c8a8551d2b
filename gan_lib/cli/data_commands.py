"""python -m gan_lib data: what data there is, fetch it, verify it, prepare it."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from gan_lib.cli.arguments import add_example
from gan_lib.parameters import CROPS, TrainingParameters
from gan_lib.sources import manifest
from gan_lib.sources.downloading import archives_of, differences, fetch
from gan_lib.sources.manifest import FOLDERS, fetched_folder

if TYPE_CHECKING:
    from gan_lib.data.image_set import ImageSet


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give `python -m gan_lib data` its own commands."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    one = commands.add_parser("list", help="the sources of data_manifest.json")
    add_example(one, "data list")
    one.set_defaults(do=_list)

    one = commands.add_parser("fetch", help="download, check and unpack a source's archives")
    one.add_argument("name", nargs="?", default="stanford-dogs")
    one.add_argument(
        "--archive", action="append", choices=list(FOLDERS), help="default: images and annotation"
    )
    add_example(one, "data fetch stanford-dogs --archive images")
    one.set_defaults(do=_fetch)

    one = commands.add_parser(
        "verify", help="compare a source's images with the manifest; read all those of any folder"
    )
    one.add_argument(
        "name",
        nargs="?",
        default="stanford-dogs",
        help="in the manifest, a folder, or an fsspec URL",
    )
    one.add_argument("--source", help="another folder or URL of the same images")
    add_example(one, "data verify pictures/")
    one.set_defaults(do=_verify)

    one = commands.add_parser("prepare", help="decode a source's images once, for training")
    one.add_argument("source", help="a name, a folder of images, or any fsspec URL")
    one.add_argument("--size", type=int, default=64, help="pixels per side")
    one.add_argument("--channels", type=int, default=3, choices=(1, 3))
    one.add_argument("--crop", default="center", choices=CROPS)
    one.add_argument("--max-images", type=int, default=0, help="0 means all")
    one.add_argument("--cache", help="folder or URL that keeps the result")
    one.add_argument("--workers", type=int, default=0, help="of a Dask cluster started for it")
    add_example(one, "data prepare pictures/ --size 32 --workers 2")
    one.set_defaults(do=_prepare)


def _list(options: argparse.Namespace) -> int:
    for name, entry in manifest.sources().items():
        print(f"{name}: {entry['title']}")
        print(f"  {entry['images']:,} images in {len(entry['classes'])} classes")
        print(f"  licence: {entry['licence']}; allows {entry['allows']}")
        if "package" in entry:
            package = entry["package"]
            print(f"  in the Python package {package['name']} {package['version']}")
            continue
        print(f"  at {entry['s3']['url']}")
        for archive, told in entry["archives"].items():
            here = fetched_folder(name, archive)
            state = f"fetched: {here}" if here.exists() else "not fetched"
            print(f"  archive {archive}: {told['bytes'] / 2**20:,.1f} MB, {state}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    archives_of(options.name)
    entry = manifest.sources()[options.name]
    print(f"{entry['title']} allows {entry['allows']}")
    print(f"cite: {entry['citation']}")
    for folder in fetch(options.name, options.archive or ("images", "annotation")):
        print(f"fetched: {folder}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    known = manifest.sources()
    if options.name not in known:
        return _verify_folder(options.name)
    entry = known[options.name]
    if "package" in entry:
        from gan_lib.sources.embedded import package_arrays

        package_arrays(entry)  # raises if a checksum is another
        print(f"{options.name}: the package's files are those of the manifest")
        return 0
    from gan_lib.sources.listing import list_files
    from gan_lib.sources.source import find_source

    place = find_source(options.source or options.name)
    wrong = differences(options.name, list_files(place).paths)
    print("\n".join([f"{place}:", *wrong] if wrong else [f"{place}: all as it should be"]))
    return 1 if wrong else 0


def _verify_folder(source: str) -> int:
    """Read and decode every file of a source that the manifest does not know."""
    with tempfile.TemporaryDirectory() as cache:
        images = _prepared(source, image_size=16, cache=cache)
        print(f"{source}: {len(images):,} images")
        for name, n in images.images_per_class().items():
            print(f"  {name}: {n:,}")
        return 1 if images.skipped else 0


def _prepared(source: str, **told: Any) -> ImageSet:
    """`prepare_images`, and a line for every file that is skipped."""
    from gan_lib.data.images import SkippedFilesWarning, prepare_images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedFilesWarning)
        images = prepare_images(source, **told)
    for url, reason in images.skipped:
        print(f"skipped: {url}: {reason}")
    return images


def _prepare(options: argparse.Namespace) -> int:
    # Only now: whoever asks for help should not wait for torch.
    from gan_lib.cluster.starting import close_cluster, start_cluster

    told = {
        "image_size": options.size,
        "channels": options.channels,
        "crop": options.crop,
        "max_images": options.max_images,
    }
    TrainingParameters(source=options.source, **told)  # raises if a value cannot be trained with
    client = start_cluster(options.workers, device="cpu") if options.workers else None
    try:
        images = _prepared(options.source, **told, client=client, cache=options.cache)
    finally:
        if client is not None:
            close_cluster(client)
    place = images.prepared or "made from their package whenever they are needed"
    print(f"{len(images):,} images in {len(images.classes)} classes: {place}")
    return 0
