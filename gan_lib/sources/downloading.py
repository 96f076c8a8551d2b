"""The archives of a data source, fetched once and unpacked beside each other on this machine.

What is fetched is checked against data_manifest.json before it is unpacked, and
unpacked aside and renamed: so a folder that is there is whole.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gan_lib.base.addresses import local_cache
from gan_lib.base.errors import SourceError
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import Folder, open_to_append
from gan_lib.sources import manifest
from gan_lib.sources.manifest import fetched_folder

CHUNK = 2**20
SECONDS_OF_SILENCE = 30
# Seconds before a broken download is taken up again.
PAUSES = (1.0, 2.0, 4.0, 8.0)


def archives_of(name: str) -> dict[str, dict[str, Any]]:
    """The archives of a source: name -> url, bytes and sha256.

    Raises:
        SourceError: if there is no such source, or it has none.
    """
    known = manifest.sources()
    having = [known_name for known_name, entry in known.items() if "archives" in entry]
    if name not in having:
        raise SourceError(f"there is no archive of {name!r} to fetch: there is {', '.join(having)}")
    archives: dict[str, dict[str, Any]] = known[name]["archives"]
    return archives


def fetch(name: str, archives: Sequence[str]) -> list[Path]:
    """Download, check and unpack archives of a source; what is there already stays.

    Returns:
        The folder of each archive.

    Raises:
        SourceError: if a file cannot be had, is another than the manifest says, or holds
            what does not belong into its folder.
    """
    known = archives_of(name)
    for archive in archives:
        if archive not in known:
            raise SourceError(f"{name!r} has no archive {archive!r}: it has {', '.join(known)}")
    return [_fetch_one(name, archive, known[archive]) for archive in archives]


def _fetch_one(name: str, archive: str, entry: dict[str, Any]) -> Path:
    target = fetched_folder(name, archive)
    part = target.parent / f"{archive}.tar.part"
    if target.exists() and not part.exists():
        return target
    Folder(local_cache()).make_private()
    waiting = f"another process is fetching {archive} of {name}: waiting for it"
    with Folder(str(target.parent)).locked(f"{archive}.lock", waiting=waiting):
        if not target.exists():
            _fetch_into(target, part, entry)
        part.unlink(missing_ok=True)
    return target


def _fetch_into(target: Path, part: Path, entry: dict[str, Any]) -> None:
    # The archive and what it holds lie there together for a moment.
    free, needed = shutil.disk_usage(target.parent).free, 2 * entry["bytes"]
    if free < needed:
        raise SourceError(
            f"{target.parent} has {free / 2**20:,.0f} MB free and {needed / 2**20:,.0f} MB are "
            "needed: make room, or name another place in the environment variable GAN_LIB_CACHE"
        )
    _download(entry["url"], part, entry["bytes"])
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry["sha256"]:
        part.unlink()
        raise SourceError(
            f"{entry['url']} has SHA-256 {found}, expected {entry['sha256']}: it was damaged on "
            "its way or is another file, nothing was unpacked and it was removed; fetch again"
        )
    _unpack(part, target)


def _download(url: str, part: Path, size: int) -> None:
    """Fill `part`, from where an earlier download stopped."""
    with ProgressBar(size, "fetching", "byte") as bar:
        bar.update(0, url.rpartition("/")[2])
        for pause in (*PAUSES, None):
            try:
                _go_on(url, part, size, bar)
                return
            except urllib.error.HTTPError as error:
                said: Exception = error
                if error.code < 500 and error.code != 429:
                    break
            # A connection that ends early raises nothing of its own: see `_go_on`.
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = error
            if pause is not None:
                time.sleep(pause)
    raise SourceError(
        f"{url} cannot be fetched: {said}. Check the network, and fetch again: "
        "what has come so far is kept"
    )


def _go_on(url: str, part: Path, size: int, bar: ProgressBar) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done > size:
        part.unlink()
        done = 0
    bar.update(done - bar.done)
    if done == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE) as answer:
        # 206 is "here is the part"; a server that knows no parts sends all of it.
        resumed = getattr(answer, "status", 200) == 206
        bar.update((done if resumed else 0) - bar.done)
        if not resumed:
            part.unlink(missing_ok=True)
        with open_to_append(str(part)) as file:
            # What has come, not what fills the chunk: an interrupt loses nothing of it.
            while data := answer.read1(CHUNK):
                file.write(data)
                bar.update(len(data))
                if file.tell() > size:
                    break
    found = part.stat().st_size
    if found < size:
        raise ConnectionError(f"the connection ended after {found:,} of {size:,} bytes")


def _unpack(archive: Path, target: Path) -> None:
    aside = archive.with_suffix(".unpacking")
    # One that was killed may have left it.
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        with tarfile.open(archive) as tar:
            # "data" refuses what would land outside, links that lead out, and devices.
            tar.extractall(aside, filter="data")
        unpacked = aside / target.name
        os.replace(unpacked if unpacked.is_dir() else aside, target)
    except (tarfile.TarError, OSError) as error:
        raise SourceError(
            f"{archive.name.removesuffix('.part')} was not unpacked: {error}. "
            "Nothing of it was kept"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def differences(name: str, paths: Sequence[str]) -> list[str]:
    """How files, by their paths below a source's folder, differ from what data_manifest.json says.

    Returns:
        One line for each class that differs.
    """
    expected = Counter(manifest.sources()[name]["classes"])
    images = [path for path in paths if path.lower().endswith((".jpg", ".jpeg"))]
    found = Counter(path.rpartition("/")[0] for path in images)
    return [
        f"{one}: {found[one]} images, expected {expected[one]}"
        for one in sorted({*expected, *found})
        if found[one] != expected[one]
    ]
