"""The bytes of many files at once: requests in flight together, each tried again if need be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar

import fsspec
from dask.system import CPU_COUNT
from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError, GenericError, InvalidPathError

from gan_lib.sources.object_store import is_s3, leave_to_s3fs, open_bucket
from gan_lib.sources.source import Source, cannot_be_read

_T = TypeVar("_T")

# Requests to a store at the same time, per process: a store answers after some 20 ms, and one core
# decodes 500 to 2,000 photographs a second.
IN_FLIGHT = 32
# Files that are asked for and not yet used: so many, or as many as fit into so much memory.
AHEAD, AHEAD_BYTES = 4 * IN_FLIGHT, 64 * 2**20
# Seconds before a request is tried again, give or take a half: together they outlast a store
# that asks for slowing down, and a network that is gone for a moment.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)

# Their threads start when they are first needed. They are kept: starting anew for each shard
# took a tenth of a preparation.
_READERS = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="reading")
_USERS = ThreadPoolExecutor(CPU_COUNT, thread_name_prefix="using")
_CHANGED = "it was changed between listing and reading"


class Unread(str):
    """Why a file could not be read; another try may go better."""


def fetch_files(
    source: Source,
    paths: Sequence[str],
    sizes: Sequence[int],
    # mypy has no way to say what a type variable is where an argument is left out.
    use: Callable[[bytes, int], _T] = lambda data, _: data,  # type: ignore[assignment,return-value]
    threads: int = 1,
) -> list[_T | Unread]:
    """Read files, many at a time, and make something of each.

    Args:
        source: says how to read them.
        paths: as its file system names them.
        sizes: in bytes, of each.
        use: is given the bytes of a file and its place in `paths`; without it, the
            bytes are the result.
        threads: in which `use` is called, the caller's among them.

    Returns:
        For each path, in order: what `use` returned, or an `Unread`.

    Raises:
        SourceError: if the source as a whole can no longer be read.
    """
    fs = source.fs
    read = partial(_read_object if is_s3(fs) else _read_file, fs)
    # A disk answers at once: threads beyond the cores would only wait for each other.
    n_readers = CPU_COUNT if isinstance(fs, LocalFileSystem) else IN_FLIGHT
    ahead = max(1, min(AHEAD, AHEAD_BYTES // max([1, *sizes])))
    results: list[_T | Unread] = [Unread()] * len(paths)
    read_any = False

    def use_some() -> None:
        nonlocal read_any
        for place, found in files:
            if isinstance(found, Exception):
                # Is it this file, or everything? A key that has expired cannot list either.
                if not (read_any and isinstance(found, FileNotFoundError)):
                    _check_that_it_lists(source, found)
                results[place] = _reason(source, found)
            else:
                read_any = True
                results[place] = use(found, place)

    files = _ReadAhead(lambda i, over: read(paths[i], sizes[i], over), len(paths), ahead)

    def start() -> list[Future[None]]:
        files.start(n_readers)
        return [_USERS.submit(use_some) for _ in range(threads - 1)]

    # Started in a thread of its own, because Ctrl-C reaches only the main one: a pool that it
    # interrupts while a thread is made forgets that thread, and the process waits for ever to end.
    with closing(files), ThreadPoolExecutor(1) as starter:
        helpers = starter.submit(start).result()
        use_some()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    return results


class _ReadAhead:
    """Files as they arrive; any number of threads may iterate over it, and share them.

    Two plain queues, no futures, and files asked for in bursts: a future wakes two
    threads for each file, and files asked for one by one arrive one by one, each
    interrupting whoever decodes. Both together took a quarter of a worker's time.

    Args:
        read: the file at this place; its event is set once nobody waits for it any more.
        n_files: how many there are.
        ahead: files that are asked for and not yet taken, at most.
    """

    def __init__(
        self, read: Callable[[int, Event], bytes | Exception], n_files: int, ahead: int
    ) -> None:
        self._read = read
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._arrived: SimpleQueue[tuple[int, bytes | Exception] | None] = SimpleQueue()
        self._places = iter(range(n_files))
        self._n_files, self._n_taken, self._ahead = n_files, 0, ahead
        self._burst = max(1, ahead // 4)
        self._closed = Event()
        self._lock = Lock()

    def start(self, n_readers: int) -> None:
        """Begin to read, in so many threads."""
        if not self._n_files:
            self.close()
        self._want(self._ahead)
        for _ in range(min(n_readers, self._n_files, self._ahead)):
            _READERS.submit(self._read_some)

    def __iter__(self) -> Iterator[tuple[int, bytes | Exception]]:
        """Pairs of a file's place and its bytes, or why there are none."""
        while (item := self._arrived.get()) is not None and not self._closed.is_set():
            with self._lock:
                self._n_taken += 1
                if self._n_taken == self._n_files:
                    self.close()
                elif self._n_taken % self._burst == 0:
                    self._want(self._burst)
            yield item
        self._arrived.put(None)  # for the next thread

    def close(self) -> None:
        """No more files, for no thread."""
        self._closed.set()
        self._wanted.put(None)
        self._arrived.put(None)

    def _want(self, n: int) -> None:
        for place in islice(self._places, n):
            self._wanted.put(place)

    def _read_some(self) -> None:
        while (place := self._wanted.get()) is not None and not self._closed.is_set():
            try:
                found = self._read(place, self._closed)
            except Exception as error:
                found = error
            self._arrived.put((place, found))
        self._wanted.put(None)  # for the next thread


def _check_that_it_lists(source: Source, error: Exception) -> None:
    try:
        source.fs.invalidate_cache()
        source.fs.ls(source.root)
    except Exception:
        raise cannot_be_read(source, error) from None


def _reason(source: Source, error: Exception) -> Unread:
    if isinstance(error, FileNotFoundError):
        return Unread("vanished between listing and reading")
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Unread(f"cannot be read: {source.clean(said) or type(error).__name__}")


def _read_file(
    fs: fsspec.AbstractFileSystem, path: str, size: int, over: Event
) -> bytes | Exception:
    # A disk that fails once fails again.
    for pause in () if isinstance(fs, LocalFileSystem) else PAUSES:
        found = _read_once(fs, path, size)
        final = isinstance(found, bytes | FileNotFoundError | PermissionError)
        if final or over.wait(_about(pause)):
            return found
    return _read_once(fs, path, size)


def _read_once(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bytes | Exception:
    try:
        # One byte more shows that it has grown; all of it might fill the memory.
        data = fs.cat_file(path, end=size + 1) if size else b""
    except Exception as error:
        return error
    return data if len(data) == size else OSError(_CHANGED)


def _read_object(fs: Any, path: str, size: int, over: Event) -> bytes | Exception:
    """One object, through obstore; through s3fs itself where that does not work."""
    bucket, key, _ = fs.split_path(path)
    store = open_bucket(fs, bucket)
    if store is None:
        return _read_once(fs, path, size)
    for pause in PAUSES:
        try:
            answer = store.get(key)
            if answer.meta["size"] != size:
                return OSError(_CHANGED)
            data = answer.bytes().to_bytes()
            if len(data) == size:
                return data
        except FileNotFoundError as error:
            return error
        except InvalidPathError:
            return _read_once(fs, path, size)
        except (GenericError, OSError):
            pass  # the network, or a store that asks for slowing down
        except BaseError:
            break
        if over.wait(_about(pause)):
            return TimeoutError("given up")
    # s3fs may know another way in; otherwise it says why there is none.
    found = _read_once(fs, path, size)
    if isinstance(found, bytes):
        leave_to_s3fs(fs, bucket)
    return found


def _about(seconds: float) -> float:
    # Workers that failed together should not come back together.
    return seconds * random.uniform(0.5, 1.5)
