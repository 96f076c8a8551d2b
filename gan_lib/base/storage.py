"""A folder here or in an object store, whose files are each written whole or not at all.

A run directory and a cache of prepared images are such folders: a reader never
sees half a file there. What a killed writer leaves has a name that nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gan_lib.base.addresses import OBJECT_STORES, absolute, is_remote, refuse_credentials
from gan_lib.base.errors import ParameterError

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may do the same work twice
    fcntl = None  # type: ignore[assignment]

# Part of the name of a file that is being written.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def open_to_append(path: str) -> BinaryIO:
    """Open a file to write at its end, and make it if it is not there.

    In a folder that many may write to, somebody may have put a link there: it is not followed.

    Raises:
        OSError: if it is a link, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "ab")


@contextlib.contextmanager
def whole_folder(path: str) -> Iterator[Path]:
    """A new folder on this machine, empty inside the block, put in place at its end.

    If the block raises, nothing is left; what a killed writer leaves has a name beginning with a
    dot, until the next one comes here.

    Raises:
        ParameterError: if the place is taken, cannot be written, or is on no disk.
    """
    if is_remote(path):
        raise ParameterError(f"out is {path!r}: name a folder of this machine")
    target = Path(absolute(path))
    if os.path.lexists(target):
        raise ParameterError(f"{target} is there already: name a new folder")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.part"):
        with _only_user(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise ParameterError(f"{target} cannot be written: {error.strerror}") from None
    try:
        with _only_user(aside):
            yield aside
            os.rename(aside, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise ParameterError(f"{target} is there by now: name a new folder") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ParameterError(f"{target} cannot be written: {error.strerror}") from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _only_user(folder: Path) -> Iterator[bool]:
    """Whether nobody else is inside this block with this folder; a killed process no longer is."""
    if fcntl is None:
        yield False
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken, gone, or on a disk that knows no locks
            only = False
        else:
            only = True
        yield only


class Folder:
    """Reads and writes the files of one folder, each whole.

    Args:
        url: a path, or an address in an object store.

    Raises:
        ParameterError: if the address holds a credential, or leads to a store in which files
            are not written whole.
    """

    def __init__(self, url: str) -> None:
        refuse_credentials("the place of a run or a cache", url)
        protocol, _ = fsspec.core.split_protocol(url)
        known = (None, "file", "local", "memory", *OBJECT_STORES)
        if protocol not in known or "::" in url:
            raise ParameterError(
                f"{url} is no place for a run or a cache, because not every store puts a file in "
                "place only when it is whole: give a folder of this machine, or an address that "
                f"begins with {'://, '.join(OBJECT_STORES)}://"
            )
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ParameterError(f"{url} cannot be opened here: {error}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def make_private(self) -> None:
        """Make it, if it is not there, for this user alone; one that is there stays as it is.

        A cache shows what private folders hold, and one that others have made may be shared.
        """
        if self.is_local:
            os.makedirs(self.root, mode=0o700, exist_ok=True)

    def write(
        self, path: str, data: bytes | Iterable[bytes | memoryview], durable: bool = True
    ) -> None:
        """Put a file in place, replacing an older one of that name.

        Args:
            path: below the folder.
            data: its whole content, or the parts of it one after the other.
            durable: wait until it would survive a loss of power.
        """
        target = f"{self.root}/{path}"
        parts = [data] if isinstance(data, bytes) else data
        if not self.is_local:
            # An object store shows an object only once it is complete.
            self.fs.pipe_file(target, b"".join(parts))
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        aside = f"{target}.{_MACHINE}.{uuid.uuid4().hex}.part"
        try:
            with open(aside, "xb") as file:
                file.writelines(parts)
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
                for left in Path(self.root).glob(f"{pattern}.*{'[0-9a-f]' * 32}.part"):
                    left.unlink(missing_ok=True)

    def read(self, path: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if it is not there.
        """
        found: bytes = self.fs.cat_file(f"{self.root}/{path}")
        return found

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of many files, read at the same time where that is faster.

        Raises:
            FileNotFoundError: if one is not there; its `filename` is the path.
        """
        found: list[Any] = self.fs.cat_ranges(
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
            found: int | None = self.fs.size(f"{self.root}/{path}")
        except FileNotFoundError:
            return None
        return found

    def exists(self, path: str) -> bool:
        """Whether the file is there now."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(f"{self.root}/{path}"))

    def is_mine(self, path: str) -> bool:
        """Whether a file lies on this machine and belongs to this user."""
        user = getattr(os, "geteuid", lambda: 0)()  # on Windows all belong to 0
        return self.is_local and os.stat(f"{self.root}/{path}").st_uid == user

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        target = f"{self.root}/{path}"
        if self.fs.exists(target):
            self.fs.rm(target)

    @contextlib.contextmanager
    def alone(self, path: str) -> Iterator[None]:
        """One process at a time, on all machines, for what takes seconds; others are refused.

        Few stores create a file only if there is none. So each says first that it wants to, by
        a file of its own: who then sees another steps back, but the first of them, which waits.

        Args:
            path: of the file, right in the folder, that is to be created.

        Raises:
            FileExistsError: if another process was there first.
        """
        name = f"{path}.{time.time():.6f}.{uuid.uuid4().hex}.claim"
        self.write(name, b"", durable=False)
        try:
            while others := self._claims(path) - {name}:
                if min(others) < name:
                    raise FileExistsError(f"another process is creating {self.url}/{path}")
                time.sleep(0.05)
            yield
        finally:
            self.remove(name)

    def _claims(self, path: str) -> set[str]:
        # Who was killed inside of it is forgotten after a minute.
        pattern = re.compile(rf"{re.escape(path)}\.(\d+\.\d+)\..*\.claim")
        found = map(pattern.fullmatch, self.names(""))
        return {claim[0] for claim in found if claim and time.time() - float(claim[1]) < 60}

    @contextlib.contextmanager
    def locked(self, path: str, *patterns: str, waiting: str = "") -> Iterator[None]:
        """One process at a time, on this machine; elsewhere nothing is locked.

        The lock of a process that dies is free at once.

        Args:
            path: of the lock, below the folder.
            patterns: files that are only written under this lock, as in `remove_unfinished`,
                which is done first for what this machine has written: another may not see the
                lock, and still write.
            waiting: is printed if another process has the lock.
        """
        if not self.is_local or fcntl is None:
            yield
            return
        target = f"{self.root}/{path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open_to_append(target) as file:
            # Some network file systems lock nothing; then the same work may be done twice.
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if waiting:
                        print(waiting, flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
                self.remove_unfinished(*(f"{pattern}.{_MACHINE}" for pattern in patterns))
            yield
