"""A source by its name, folder or URL; what was found there; and what is wrong with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import fsspec

from gan_lib.base.addresses import absolute, is_remote, refuse_credentials, without_secrets
from gan_lib.base.errors import SourceError
from gan_lib.sources import manifest
from gan_lib.sources.manifest import fetched_folder
from gan_lib.sources.object_store import has_keys, is_s3

# What a request may take, in seconds, before it is tried again. Without this, botocore waits
# for a minute, five times.
_S3_PATIENCE = {"connect_timeout": 5, "read_timeout": 15}


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

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        return fs, root.rstrip("/")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """Its file system."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The folder's path in its file system."""
        return self._opened[1]

    def is_without_keys(self) -> bool:
        """Whether this is S3, and keys are wanted and not there."""
        return is_s3(self.fs) and "anon" not in self.options and not has_keys(self.fs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A file system belongs to the process, and the environment, in which it was opened.
        return Source, (self.name, self.url, self.options)

    def beside(self, folder: str) -> Source:
        """The folder of that name next to this one."""
        return replace(self, url=f"{self.url.rstrip('/').rpartition('/')[0]}/{folder}")

    def clean(self, error: object) -> str:
        """What an error says, without a credential."""
        return without_secrets(str(error), self.options)

    def shown(self, path: str) -> str:
        """The address of a file below the folder, without a credential."""
        return self.clean(self.fs.unstrip_protocol(f"{self.root}/{path}"))

    def __str__(self) -> str:
        return repr(self.name) if self.name == self.url else f"{self.name!r} ({self.url})"


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        source: which.
        paths: below the folder, sorted.
        sizes: in bytes, of each path.
        fingerprint: SHA-256 of paths, sizes and versions: another if a file changes.
        skipped: pairs of path and reason, for what can be no image.
    """

    source: Source
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()

    def class_of(self, path: str) -> str:
        """The name of the folder that a file lies in."""
        return os.path.dirname(path).rpartition("/")[2] or os.path.basename(self.source.root)

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
    if isinstance(error, OSError) and source.is_without_keys():
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
