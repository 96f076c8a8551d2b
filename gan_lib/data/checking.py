"""Whether a source can be used, found out within seconds."""

from __future__ import annotations

from PIL import Image

from gan_lib.base.addresses import is_remote
from gan_lib.data.decoding import FORMATS
from gan_lib.sources import manifest
from gan_lib.sources.embedded import package_arrays
from gan_lib.sources.listing import list_files, look_at
from gan_lib.sources.source import find_source, no_images

# How many files `check_source` opens before it trusts the rest of a folder.
LOOK_AT = 20


def check_source(source: str) -> None:
    """Find out within seconds whether a source can be used, without reading all of it.

    Raises:
        SourceError: if it is not there, or the first files of it hold no image.
    """
    entry = manifest.sources().get(source)
    if entry is not None and "package" in entry:
        package_arrays(entry)
        return
    place = find_source(source)
    if is_remote(place.url):
        look_at(place)
    else:
        files = list_files(place)
        if len(files.paths) <= LOOK_AT and not any(
            _opens(f"{files.source.root}/{path}") for path in files.paths
        ):
            raise no_images(files)


def _opens(path: str) -> bool:
    try:
        with Image.open(path, formats=FORMATS):
            return True
    # Pillow's plugins raise nearly anything on damaged files.
    except Exception:
        return False
