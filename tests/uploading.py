"""Files for the tests' S3 server."""

from __future__ import annotations

from pathlib import Path

import fsspec


def upload(folder: Path, place: str) -> None:
    """Copy a folder to S3, one file after the other.

    Of two that come at once and both need a new folder, rclone refuses one before it has
    read its body, and then waits for that body: for ever, because s3fs sends it only when
    asked for it.
    """
    fsspec.filesystem("s3").put(f"{folder}/", f"{place}/", recursive=True, batch_size=1)
