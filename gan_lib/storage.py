"""A folder at any fsspec URL, whose files are each written whole or not at all.

A run directory and a cache of prepared images are such folders: a reader never
sees half a file there. What a killed writer leaves has a name that nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gan_lib.errors import ParameterError

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may do the same work twice
    fcntl = None  # type: ignore[assignment]

# Where prepared images go unless the caller says otherwise: a path, or any fsspec URL.
CACHE_VARIABLE = "GAN_LIB_CACHE"
# Names under which a URL's query carries what nobody else should read.
_SECRET_NAME = re.compile(r"sign|secret|token|password|credential|access.?key|^sig$", re.IGNORECASE)


def is_remote(url: str) -> bool:
    """Whether this is a URL, not a path on this machine."""
    return "://" in url or "::" in url


def absolute(url: str) -> str:
    """The place as another process can name it: a path on this machine in full."""
    return url if is_remote(url) else str(Path(url).expanduser().resolve())


def local_cache() -> str:
    """The folder on this machine for what can be made or fetched again."""
    named = os.environ.get(CACHE_VARIABLE, "")
    if named and not is_remote(named):
        return absolute(named)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return absolute(os.path.join(base, "gan_lib"))


def prepared_cache() -> str:
    """The folder, here or elsewhere, for prepared images."""
    return f"{os.environ.get(CACHE_VARIABLE, '') or local_cache()}/prepared"


def refuse_credentials(name: str, url: str) -> None:
    """A URL is written to logs and parameters.json, so it must not hold a password or a key.

    Raises:
        ParameterError: that does not repeat it.
    """
    if not is_remote(url):
        return
    parts = urlsplit(url.rsplit("::", 1)[-1])
    in_query = any(_SECRET_NAME.search(key) for key, _ in parse_qsl(parts.query))
    if "@" in parts.netloc or in_query:
        raise ParameterError(
            f"{name} is a {parts.scheme}:// address that holds a credential, and addresses are "
            "written to logs and files: give it through the environment (for S3 AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY), fsspec's configuration, or storage_options"
        )


def without_secrets(text: str, options: Mapping[str, Any] | None = None) -> str:
    """`text` without any value of `options` or of the environment that gives access."""
    secrets = {v for k, v in os.environ.items() if k.startswith("AWS_") and _SECRET_NAME.search(k)}
    found = [dict(options or {})]
    while found:
        for key, value in found.pop().items():
            if isinstance(value, Mapping):
                found.append(dict(value))
            elif isinstance(value, str) and (
                key in ("key", "username") or _SECRET_NAME.search(str(key))
            ):
                secrets.add(value)
    for secret in sorted(secrets, key=len, reverse=True):
        # Anything shorter is no secret, and may be a part of every other word.
        if len(secret) >= 6:
            text = text.replace(secret, "***")
    return text


def file_exists(url: str, path: str) -> bool:
    """Whether a folder has a file; sent to a worker, whether that worker sees it."""
    return Folder(url).exists(path)


class Folder:
    """Reads and writes the files of one folder, each whole.

    Args:
        url: a path or any fsspec URL.
        options: for its fsspec file system.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.fs, self.root = fsspec.core.url_to_fs(url, **(options or {}))
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def write(self, path: str, data: bytes, durable: bool = True) -> None:
        """Put a file in place, replacing an older one of that name.

        Args:
            path: below the folder.
            data: its whole content.
            durable: wait until it would survive a loss of power; if not, `flush` does later.
        """
        target = f"{self.root}/{path}"
        if not self.is_local:
            # An object store shows an object only once it is complete.
            self.fs.pipe_file(target, data)
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        aside = f"{target}.{uuid.uuid4().hex}.part"
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(aside)

    def remove_unfinished(self, *patterns: str) -> None:
        """Delete what writers that were killed have left of these files.

        Only for files that nobody else can be writing now: it would be deleted under their hands.

        Args:
            patterns: paths below the folder; `*` stands for anything in a name.
        """
        if self.is_local:
            for pattern in patterns:
                for left in Path(self.root).glob(f"{pattern}.{'[0-9a-f]' * 32}.part"):
                    left.unlink(missing_ok=True)

    def flush(self, path: str) -> None:
        """Wait until a file that was written would survive a loss of power."""
        if self.is_local:
            with open(f"{self.root}/{path}", "rb") as file:
                os.fsync(file.fileno())

    def read(self, path: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if it is not there.
        """
        return self.fs.cat_file(f"{self.root}/{path}")

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of many files, read at the same time where that is faster.

        Raises:
            FileNotFoundError: if one is not there; its `filename` is the path.
        """
        found = self.fs.cat_ranges(
            [f"{self.root}/{path}" for path in paths], None, None, on_error="return"
        )
        for path, content in zip(paths, found, strict=True):
            if isinstance(content, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if isinstance(content, Exception):
                raise content
        return found

    def names(self, path: str) -> list[str]:
        """The names of the files in a folder below; none if it is not there."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(f"{self.root}/{path}", detail=False)
        except FileNotFoundError:
            return []
        return [os.path.basename(name) for name in found]

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        self.fs.invalidate_cache()
        try:
            return self.fs.size(f"{self.root}/{path}")
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        """Whether the file is there now."""
        self.fs.invalidate_cache()
        return self.fs.exists(f"{self.root}/{path}")

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        target = f"{self.root}/{path}"
        if self.fs.exists(target):
            self.fs.rm(target)

    @contextlib.contextmanager
    def locked(self, path: str, *patterns: str) -> Iterator[None]:
        """One process at a time, on this machine; elsewhere nothing is locked.

        The lock of a process that dies is free at once.

        Args:
            path: of the lock, below the folder.
            patterns: files that are only written under this lock, as in `remove_unfinished`,
                which is done first.
        """
        if not self.is_local or fcntl is None:
            yield
            return
        target = f"{self.root}/{path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            # Some network file systems lock nothing; then the same work may be done twice.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                self.remove_unfinished(*patterns)
            yield
