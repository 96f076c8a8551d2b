"""The bytes of many files at once: requests in flight together, each tried again if need be."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError, GenericError, InvalidPathError

from gan_lib.listing import Source, cannot_be_read
from gan_lib.object_store import is_s3, leave_to_s3fs, open_bucket

_T = TypeVar("_T")

# Requests to a store at the same time, per process: a store answers after some 20 ms, and one core
# decodes 500 to 1,000 photographs a second.
IN_FLIGHT = 32
# The memory that files may take which are read and not yet used.
WAITING_BYTES = 64 * 2**20
# Seconds before a request is tried again, give or take a half: together they outlast a store
# that asks for slowing down, and a network that is gone for a moment.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)

# Its threads start when they are first needed. They are kept: starting anew for each shard
# took a tenth of a preparation.
_POOL = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetching")


def fetch_files(
    source: Source,
    paths: Sequence[str],
    sizes: Sequence[int],
    use: Callable[[bytes, int], _T] = lambda data, _: data,  # type: ignore[assignment,return-value]
) -> Iterator[_T | str]:
    """Read files, many at a time, and make something of each.

    Args:
        source: says how to read them.
        paths: as its file system names them.
        sizes: in bytes, of each.
        use: is given the bytes of a file and its place in `paths`, in the thread that
            read it; without it, the bytes are the result.

    Returns:
        For each path, in order: what `use` returned, or the reason why there are no bytes.

    Raises:
        SourceError: if the source as a whole can no longer be read.
    """
    fs, root = source.open()
    read = _reader(fs)

    def read_and_use(path: str, size: int, place: int) -> _T | Exception:
        found = read(path, size)
        return found if isinstance(found, Exception) else use(found, place)

    read_any = False
    # A disk answers at once: threads beyond the cores would only wait for each other.
    at_once = (os.cpu_count() or 1) if isinstance(fs, LocalFileSystem) else IN_FLIGHT
    ahead = max(1, min(at_once, WAITING_BYTES // max([1, *sizes])))
    for result in _in_order(read_and_use, paths, sizes, ahead):
        if isinstance(result, Exception):
            # Is it this file, or everything? A key that has expired cannot list either.
            if not (read_any and isinstance(result, FileNotFoundError)):
                _check_that_it_lists(source, fs, root, result)
            yield _reason(source, result)
        else:
            read_any = True
            yield result


def _in_order(
    function: Callable[[str, int, int], _T], paths: Sequence[str], sizes: Sequence[int], ahead: int
) -> Iterator[_T]:
    """As `_POOL.map`, with at most `ahead` calls begun whose results are not yet taken."""
    begun: deque[Future[_T]] = deque()
    try:
        for place, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            if len(begun) == ahead:
                yield begun.popleft().result()
            begun.append(_POOL.submit(function, path, size, place))
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def _check_that_it_lists(
    source: Source, fs: fsspec.AbstractFileSystem, root: str, error: Exception
) -> None:
    try:
        fs.invalidate_cache()
        fs.ls(root)
    except Exception:
        raise cannot_be_read(source, error) from None


def _reason(source: Source, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "vanished between listing and reading"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {source.clean(said) or type(error).__name__}"


def _reader(fs: fsspec.AbstractFileSystem) -> Callable[[str, int], bytes | Exception]:
    """Reads one file, by its path and size, as suits the file system."""
    if isinstance(fs, LocalFileSystem):
        return lambda path, size: _read_once(fs, path)
    if is_s3(fs):
        return partial(_read_object, fs)
    return lambda path, size: _read_file(fs, path)


def _read_file(fs: fsspec.AbstractFileSystem, path: str) -> bytes | Exception:
    for pause in PAUSES:
        found = _read_once(fs, path)
        if not _may_come_back(found):
            return found
        time.sleep(_about(pause))
    return _read_once(fs, path)


def _may_come_back(result: bytes | Exception) -> bool:
    return isinstance(result, OSError) and not isinstance(result, FileNotFoundError)


def _read_once(fs: fsspec.AbstractFileSystem, path: str) -> bytes | Exception:
    try:
        return fs.cat_file(path)
    except Exception as error:
        return error


def _read_object(fs: Any, path: str, size: int) -> bytes | Exception:
    """One object, through obstore; through s3fs itself where that does not work."""
    bucket, key, _ = fs.split_path(path)
    store = open_bucket(fs, bucket)
    for pause in PAUSES if store is not None else ():
        try:
            data = store.get(key).bytes().to_bytes()
            if len(data) == size:
                return data
        except FileNotFoundError as error:
            return error
        except InvalidPathError:
            return _read_once(fs, path)
        except (GenericError, OSError):
            pass  # the network, or a store that asks for slowing down
        except BaseError:
            break
        time.sleep(_about(pause))
    # s3fs may know another way in; otherwise it says why there is none.
    found = _read_once(fs, path)
    if store is not None and isinstance(found, bytes):
        leave_to_s3fs(fs, bucket)
    return found


def _about(seconds: float) -> float:
    # Workers that failed together should not come back together.
    return seconds * random.uniform(0.5, 1.5)
