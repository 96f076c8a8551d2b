"""Where images are: a source by its name, folder or URL, and the files that it holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError

from gan_lib.base.errors import SourceError, UserError
from gan_lib.base.storage import (
    absolute,
    is_remote,
    prepared_cache,
    refuse_credentials,
    without_secrets,
)
from gan_lib.sources import manifest
from gan_lib.sources.downloading import fetched_folder
from gan_lib.sources.object_store import LIST_AT_ONCE, has_keys, is_s3, list_objects, open_bucket

# An image file is smaller; an archive that lies next to the images is not read.
LARGEST_FILE = 256 * 2**20
# What a request may take, in seconds, before it is tried again. Without this, botocore waits
# for a minute, five times.
_S3_PATIENCE = {"connect_timeout": 5, "read_timeout": 15}
# Folders whose files were not put there by a person, beside those that begin with a dot: macOS
# and Synology keep data of their own in them, thumbnails among them.
_NOT_MEANT = ("__MACOSX", "@eaDir")
# What different file systems call the version of a file, the surest first.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "CRC", "sha", "LastModified"),
    *("last_modified", "Last-Modified", "updated", "mtime", "modify", "modificationTime"),
    "created",
)


@dataclass(frozen=True)
class Source:
    """A place with images.

    Attributes:
        name: as it was given.
        url: the folder, as a path or an fsspec URL.
        options: for its file system; may hold credentials, and is never shown.
    """

    name: str
    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Its file system, and the folder's path there."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        return fs, root.rstrip("/")

    def beside(self, folder: str) -> Source:
        """The folder of that name next to this one."""
        return replace(self, url=f"{self.url.rstrip('/').rpartition('/')[0]}/{folder}")

    def clean(self, error: object) -> str:
        """What an error says, without a credential."""
        return without_secrets(str(error), self.options)

    def __str__(self) -> str:
        return repr(self.name) if self.name == self.url else f"{self.name!r} ({self.url})"


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        source: which.
        root: its folder, as its file system names it.
        paths: below the folder, sorted.
        sizes: in bytes, of each path.
        fingerprint: SHA-256 of paths, sizes and versions: another if a file changes.
        skipped: pairs of path and reason, for what can be no image.
    """

    source: Source
    root: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()

    def class_of(self, path: str) -> str:
        """The name of the folder that a file lies in."""
        return _folder(path).rstrip("/").rpartition("/")[2] or os.path.basename(self.root)

    def chosen(self, indices: list[int]) -> Listing:
        """Only some of the files."""
        paths = tuple(self.paths[i] for i in indices)
        return replace(self, paths=paths, sizes=tuple(self.sizes[i] for i in indices))


def find_source(source: str, storage_options: Mapping[str, Any] | None = None) -> Source:
    """The place behind a name of data_manifest.json, a folder, or an fsspec URL.

    Raises:
        SourceError: if the name is that of a source without files.
        ParameterError: if the URL holds a credential.
    """
    refuse_credentials("source", source)
    options = dict(storage_options or {})
    entry = manifest.sources().get(source)
    if entry is not None:
        if "s3" not in entry:
            raise SourceError(f"the source {source!r} has no files of its own: it is a package")
        fetched = fetched_folder(source)
        if fetched.exists():
            return Source(source, str(fetched))
        url = entry["s3"]["url"]
        options = {"anon": entry["s3"]["anonymous"], **options}
    else:
        url = source if is_remote(source) else absolute(source)
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {**_S3_PATIENCE, **options.get("config_kwargs", {})}
    return Source(source, url, options)


def resolve_source(source: str) -> str:
    """The source as another process can read it: a local folder by its absolute path."""
    return source if source in manifest.sources() else absolute(source)


def list_files(source: Source) -> Listing:
    """All files below a source.

    Raises:
        SourceError: if it is not there, cannot be read, is a file, or holds no file.
    """
    with _one_sentence(source):
        source, fs, root = _open_anew(source)
        if isinstance(fs, LocalFileSystem):
            files, skipped = _walk(source, root)
        else:
            files, skipped = _find(source, fs, root)
    hidden = {folder: _hidden_part(folder) for folder in {_folder(path) for path, _, _ in files}}
    if any(hidden.values()):
        skipped += [(folder, "a hidden folder") for folder in set(hidden.values()) - {""}]
        files = [file for file in files if not hidden[_folder(file[0])]]
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
        root,
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
        _, fs, root = _open_anew(place)
        if not fs.ls(root, detail=False):
            raise not_there(place)


def _open_anew(source: Source) -> tuple[Source, fsspec.AbstractFileSystem, str]:
    """As `Source.open`, with nothing listed before; S3 anonymously, where there are no keys."""
    fs, root = source.open()
    # Another call may have listed it before, and files come and go.
    fs.invalidate_cache()
    if _is_without_keys(source):
        return _open_anew(replace(source, options={**source.options, "anon": True}))
    return source, fs, root


def _is_without_keys(source: Source) -> bool:
    """Whether this is S3, and keys are wanted and not there."""
    fs, _ = source.open()
    return is_s3(fs) and "anon" not in source.options and not has_keys(fs)


def not_there(source: Source) -> SourceError:
    """The error for a place that does not exist."""
    return SourceError(
        f"the source {source} does not exist: give a folder of images, "
        f"or a source of data_manifest.json ({', '.join(manifest.sources())})"
    )


def no_images(files: Listing, reasons: Iterable[str] = ()) -> SourceError:
    """The error for a place in which nothing is an image, with what was found instead."""
    names = [*files.paths, *(path for path, _ in files.skipped)]
    kinds = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in names)
    found = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))
    common = Counter([*reasons, *(why for _, why in files.skipped)]).most_common(3)
    why = f"; {', '.join(f'{n} x {why}' for why, n in common)}" if common else ""
    return SourceError(
        f"none of the {len(names)} files in {files.source} is an image that can be read "
        f"(found: {found}{why}): give a folder of images"
    )


def cannot_be_read(source: Source, error: BaseException) -> SourceError:
    """What a file system raised for the whole of a source, as one sentence with its cure."""
    said = source.clean(error) or type(error).__name__
    if isinstance(error, OSError) and _is_without_keys(source):
        cure = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: there are no keys, and the store "
            "does not let everybody read"
        )
    elif isinstance(error, PermissionError):
        cure = (
            "check the keys (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and a session token "
            "that may have expired), or unset them for a public bucket"
        )
    else:
        cure = "check the address, the network and the credentials, or name a folder here"
    return SourceError(f"the source {source} cannot be read: {said}. To mend it, {cure}")


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


def _find(
    source: Source, fs: fsspec.AbstractFileSystem, root: str
) -> tuple[list[_File], list[tuple[str, str]]]:
    found = _find_objects(fs, root) if is_s3(fs) else None
    return _find_files(source, fs, root) if found is None else (found, [])


def _find_objects(fs: fsspec.AbstractFileSystem, root: str) -> list[_File] | None:
    """The objects of S3 below a root; None where s3fs is to look, or to say what is wrong."""
    bucket, prefix, _ = fs.split_path(root)
    store = open_bucket(fs, bucket)
    if store is None:
        return None
    try:
        return [
            (info["path"][len(prefix) :].lstrip("/"), info["size"], _stamp({"ETag": info["e_tag"]}))
            for info in list_objects(store, prefix)
        ] or None
    except (BaseError, OSError):
        return None


def _find_files(
    source: Source, fs: fsspec.AbstractFileSystem, root: str
) -> tuple[list[_File], list[tuple[str, str]]]:
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
        told = list(pool.map(lambda info: _file(source, fs, root, info), infos))
    return [one for one in told if len(one) == 3], [one for one in told if len(one) == 2]


def _file(
    source: Source, fs: fsspec.AbstractFileSystem, root: str, info: Mapping[str, Any]
) -> _File | tuple[str, str]:
    """A listed file; or its path and the reason why it cannot be used."""
    path = info["name"][len(root) + 1 :]
    # A list of links, such as that of a web server, tells neither; its files do.
    if info.get("size") is None or not _stamp(info):
        try:
            info = fs.info(info["name"])
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


def _walk(source: Source, root: str) -> tuple[list[_File], list[tuple[str, str]]]:
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


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


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
