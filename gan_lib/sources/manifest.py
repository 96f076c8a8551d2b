"""What data there is: reads data_manifest.json.

Each source says where its images are, how many there are, and what its licence
allows. An entry has either a `package` (images inside a Python package) or an
`s3` place (class folders of images).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import SourceError

_PLACES = (
    CHECKOUT / "data_manifest.json",
    Path(__file__).parents[1] / "data_manifest.json",  # the archive that a cluster is sent
    Path(sys.prefix) / "share" / "gan_lib" / "data_manifest.json",  # an installed wheel
)


@cache
def manifest_text() -> str:
    """The text of data_manifest.json.

    Raises:
        SourceError: if the installation has lost the file.
    """
    for place in _PLACES:
        try:
            # The loader, because inside an uploaded zip there are no files to open.
            return __spec__.loader.get_data(str(place)).decode()
        except OSError:
            continue
    raise SourceError(
        f"data_manifest.json is in none of {', '.join(str(p.parent) for p in _PLACES)}: "
        "install gan_lib again from a complete checkout"
    )


def sources() -> dict[str, dict[str, Any]]:
    """Name -> entry of every known data source."""
    return json.loads(manifest_text())["sources"]


def package_file(package: str, path: str, sha256: str) -> bytes:
    """The bytes of one file of an installed Python package, after checking its SHA-256.

    Raises:
        SourceError: if the package or the file is missing, or its content is another.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"the Python package {package!r} is not installed: pip install {package}"
        ) from None
    for file in files:
        if str(file) == path:
            data = file.locate().read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise SourceError(
                    f"{path} of package {package!r} has SHA-256 {found}, expected {sha256}: "
                    f"install the version that data_manifest.json names"
                )
            return data
    raise SourceError(f"package {package!r} holds no file {path!r}: install it again")
