"""What data there is: reads data_manifest.json.

Each source says where its images are, how many there are, and what its licence
allows. An entry has either a `package` (images inside a Python package) or an
`s3` place (class folders of images).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gan_lib.base.addresses import local_cache
from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import SourceError

# The folder that each of Stanford's archives unpacks to.
FOLDERS = {"images": "Images", "annotation": "Annotation", "lists": "lists"}


@cache
def manifest_text() -> str:
    """The text of data_manifest.json.

    Raises:
        SourceError: if the installation has lost the file.
    """
    places = (
        CHECKOUT,
        resources.files("gan_lib"),  # in the archive that a cluster is sent
        Path(sys.prefix, "share", "gan_lib"),  # of an installed wheel
    )
    for place in places:
        with contextlib.suppress(OSError):
            return place.joinpath("data_manifest.json").read_text(encoding="utf-8")
    raise SourceError(
        f"data_manifest.json is in none of {', '.join(map(str, places))}: "
        "install gan_lib again from a complete checkout"
    )


def sources() -> dict[str, dict[str, Any]]:
    """Name -> entry of every known data source."""
    found: dict[str, dict[str, Any]] = json.loads(manifest_text())["sources"]
    return found


def fetched_folder(name: str, archive: str = "images") -> Path:
    """Where `fetch` puts the content of an archive of a source."""
    return Path(local_cache(), "sources", name, FOLDERS[archive])


def package_file(package: str, path: str, sha256: str) -> bytes:
    """The bytes of one file of an installed Python package, after checking its SHA-256.

    Raises:
        SourceError: if the package or the file is missing, or its content is another.
    """
    try:
        data = Path(str(importlib.metadata.distribution(package).locate_file(path))).read_bytes()
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"the Python package {package!r} is not installed: pip install {package}"
        ) from None
    except OSError:
        raise SourceError(f"package {package!r} holds no file {path!r}: install it again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SourceError(
            f"{path} of package {package!r} has SHA-256 {found}, expected {sha256}: "
            "install it again, in the version that gan_lib asks for"
        )
    return data
