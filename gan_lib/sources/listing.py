"""Which files a source holds, and in which version."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError

from gan_lib.base.addresses import absolute, prepared_cache
from gan_lib.base.errors import SourceError, UserError
from gan_lib.sources.object_store import LIST_AT_ONCE, is_s3, list_objects, open_bucket
from gan_lib.sources.source import Listing, Source, cannot_be_read, not_there

# An image file is smaller; an archive that lies next to the images is not read.
LARGEST_FILE = 256 * 2**20
# Folders whose files were not put there by a person, beside those that begin with a dot: macOS
# and Synology keep data of their own in them, thumbnails among them.
_NOT_MEANT = ("__MACOSX", "@eaDir")
# What different file systems call the version of a file, the surest first.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "CRC", "sha", "LastModified"),
    *("last_modified", "Last-Modified", "updated", "mtime", "modify", "modificationTime"),
    "created",
)


def list_files(source: Source) -> Listing:
    """All files below a source.

    Raises:
        SourceError: if it is not there, cannot be read, is a file, or holds no file.
    """
    with _one_sentence(source):
        source = _opened_anew(source)
        walk = _walk if isinstance(source.fs, LocalFileSystem) else _find
        files, skipped = walk(source)
    folders = {os.path.dirname(path) for path, _, _ in files}
    hidden = {folder: _hidden_part(folder) for folder in folders}
    if any(hidden.values()):
        skipped += [(folder, "a hidden folder") for folder in set(hidden.values()) - {""}]
        files = [file for file in files if not hidden[os.path.dirname(file[0])]]
    if not files and not skipped:
        raise SourceError(f"the folder {source} is empty: put images into it")
    files.sort()
    digest = hashlib.sha256()
    for path, size, stamp in files:
        digest.update(f"{path}\0{size}\0{stamp}\n".encode(errors="surrogateescape"))
    for path, size, _ in files:
        if size > LARGEST_FILE:
            skipped.append((path, f"{size / 2**20:.0f} MB is no image file"))
    usable = [(path, size) for path, size, _ in files if size <= LARGEST_FILE]
    return Listing(
        source,
        paths=tuple(path for path, _ in usable),
        sizes=tuple(size for _, size in usable),
        fingerprint=digest.hexdigest(),
        skipped=tuple(sorted(skipped)),
    )


def look_at(place: Source) -> None:
    """Raise SourceError if a place cannot be listed.

    Its first level only: a bucket may hold a million files.
    """
    with _one_sentence(place):
        opened = _opened_anew(place)
        if not opened.fs.ls(opened.root, detail=False):
            raise not_there(place)


def _opened_anew(source: Source) -> Source:
    """With nothing listed before; S3 anonymously, where there are no keys."""
    # Another call may have listed it before, and files come and go.
    source.fs.invalidate_cache()
    if source.is_without_keys():
        return _opened_anew(replace(source, options={**source.options, "anon": True}))
    return source


@contextlib.contextmanager
def _one_sentence(source: Source) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise not_there(source) from None
    # Each remote file system has exceptions of its own, with no common ancestor. What they
    # chain may show a request with its keys, so the chain ends here.
    except Exception as error:
        raise cannot_be_read(source, error) from None


# path below the root, bytes, version
_File = tuple[str, int, str]


def _find_objects(source: Source) -> list[_File]:
    """The objects of S3; none where s3fs is to look, or to say what is wrong."""
    bucket, prefix, _ = source.fs.split_path(source.root)
    store = open_bucket(source.fs, bucket)
    if store is None:
        return []
    try:
        return [
            (info["path"][len(prefix) :].lstrip("/"), info["size"], _stamp({"ETag": info["e_tag"]}))
            for info in list_objects(store, prefix)
        ]
    except (BaseError, OSError):
        return []


def _find(source: Source) -> tuple[list[_File], list[tuple[str, str]]]:
    fs, root = source.fs, source.root
    if is_s3(fs) and (objects := _find_objects(source)):
        return objects, []
    top = fs.ls(root, detail=True)
    if [info["name"].rstrip("/") for info in top] == [root] and top[0]["type"] == "file":
        raise SourceError(f"the source {source} is a file, not a folder: name its folder")
    folders = [info["name"] for info in top if info["type"] == "directory"]
    found = {info["name"]: info for info in top if info["type"] == "file"}
    with ThreadPoolExecutor(LIST_AT_ONCE) as pool:
        for below in pool.map(lambda folder: fs.find(folder, detail=True), folders):
            found |= below
        if not found and not folders:
            raise not_there(source)
        # An object whose name ends with a slash marks a folder.
        infos = [i for path, i in found.items() if i["type"] == "file" and not path.endswith("/")]
        told = list(pool.map(lambda info: _file(source, info), infos))
    return [one for one in told if len(one) == 3], [one for one in told if len(one) == 2]


def _file(source: Source, info: Mapping[str, Any]) -> _File | tuple[str, str]:
    """A listed file; or its path and the reason why it cannot be used."""
    path = info["name"][len(source.root) + 1 :]
    # A list of links, such as that of a web server, tells neither; its files do.
    if info.get("size") is None or not _stamp(info):
        try:
            info = source.fs.info(info["name"])
        # Each remote file system has exceptions of its own.
        except Exception as error:
            return path, f"cannot be read: {source.clean(error) or type(error).__name__}"
    if info.get("size") is None or not _stamp(info):
        # Read all the same it might fill the memory, and old pixels would pass for new ones.
        return path, "its size or its version is not told: copy it to a folder or a bucket"
    return path, info["size"], _stamp(info)


def _stamp(info: Mapping[str, Any]) -> str:
    """What tells one version of a file from another."""
    return next((str(info[name]).strip('"') for name in _STAMPS if info.get(name)), "")


def _walk(source: Source) -> tuple[list[_File], list[tuple[str, str]]]:
    root = source.root
    if not os.path.lexists(root):
        raise not_there(source)
    if not os.path.isdir(root):
        raise SourceError(f"the source {source} is a file, not a folder: name its folder")
    if not os.access(root, os.R_OK | os.X_OK):
        raise SourceError(f"the folder {source} may not be read: change its permissions")
    files: list[_File] = []
    skipped: list[tuple[str, str]] = []
    whole = os.path.realpath(root)
    cache = absolute(prepared_cache())
    followed: set[str] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda e: e.name)
        except OSError as error:
            skipped.append((folder, f"cannot be read: {error.strerror}"))
            continue
        if not entries and folder:
            skipped.append((folder, "an empty folder"))
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                info = entry.stat()
            except OSError as error:
                kind = "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
                skipped.append((path, f"{kind}: {error.strerror}"))
                continue
            if stat.S_ISREG(info.st_mode):
                files.append((path, info.st_size, str(info.st_mtime_ns)))
            elif not stat.S_ISDIR(info.st_mode):
                skipped.append((path, "neither a file nor a folder"))
            elif entry.is_symlink() and not _leads_elsewhere(entry.path, whole, followed):
                skipped.append((path, "a link to a folder that is read already, or in a circle"))
            elif _is_hidden(entry.name):
                skipped.append((path, "a hidden folder"))
            elif os.path.realpath(entry.path) != cache:
                waiting.append(path)
    return files, skipped


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder in _NOT_MEANT


def _hidden_part(folder: str) -> str:
    """The hidden folder that a folder is or lies in; empty if there is none."""
    folders = folder.split("/")
    n = next((i for i, folder in enumerate(folders, 1) if _is_hidden(folder)), 0)
    return "/".join(folders[:n])


def _leads_elsewhere(link: str, whole: str, followed: set[str]) -> bool:
    """Whether a link to a folder brings new files: each folder is read once."""
    target = os.path.realpath(link)
    inside = target == whole or target.startswith(whole + os.sep)
    around = whole.startswith(target.rstrip(os.sep) + os.sep)
    again = any(target == f or target.startswith(f + os.sep) for f in followed)
    if inside or around or again:
        return False
    followed.add(target)
    return True
