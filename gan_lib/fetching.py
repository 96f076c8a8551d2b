"""The bytes of many files at once: requests in flight together, each tried again if need be."""

from __future__ import annotations

import datetime
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError, GenericError, InvalidPathError
from obstore.store import S3Store

from gan_lib.listing import Source, cannot_be_read

_T = TypeVar("_T")

# Requests at the same time, per process: a store answers after some 20 ms, and one core
# decodes 500 to 1,000 photographs a second.
IN_FLIGHT = 32
# The memory that files may take which are read and not yet decoded.
WAITING_BYTES = 64 * 2**20
# Seconds before a request is tried again, give or take a half: together they outlast a store
# that asks for slowing down, and a network that is gone for a moment.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
# A response that stops flowing for so many seconds is given up.
SECONDS_OF_SILENCE = 10


# Its threads start when they are first needed. They are kept: starting anew for each shard
# took a tenth of a preparation.
_POOL = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetching")


def fetch_files(
    source: Source, paths: Sequence[str], sizes: Sequence[int]
) -> Iterator[bytes | str]:
    """Read files; while one is used, the next ones are on their way.

    Args:
        source: says how to read them.
        paths: as its file system names them.
        sizes: in bytes, of each.

    Returns:
        For each path, in order: the bytes of the file, or the reason why it has none.

    Raises:
        SourceError: if the source as a whole can no longer be read.
    """
    fs, root = source.open()
    read = _reader(fs, paths)
    ahead = max(1, min(IN_FLIGHT, WAITING_BYTES // max([1, *sizes])))
    read_any = False
    for result in in_order(_POOL, read, paths, sizes, ahead=ahead):
        if isinstance(result, Exception):
            # Is it this file, or everything? A key that has expired cannot list either.
            if not (read_any and isinstance(result, FileNotFoundError)):
                _check_that_it_lists(source, fs, root, result)
            yield _reason(source, result)
        else:
            read_any = True
            yield result


def in_order(
    pool: ThreadPoolExecutor, function: Callable[..., _T], *arguments: Iterable[Any], ahead: int
) -> Iterator[_T]:
    """As `pool.map`, with at most `ahead` calls begun whose results are not yet taken."""
    begun: deque[Future[_T]] = deque()
    try:
        for values in zip(*arguments, strict=True):
            if len(begun) == ahead:
                yield begun.popleft().result()
            begun.append(pool.submit(function, *values))
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


def _reader(
    fs: fsspec.AbstractFileSystem, paths: Sequence[str]
) -> Callable[[str, int], bytes | Exception]:
    """Reads one file, by its path and size, as suits the file system."""
    if isinstance(fs, LocalFileSystem):
        return lambda path, size: _read_once(fs, path)
    if "s3" in fs.protocol and paths:
        return partial(_read_object, fs, _store(fs, paths[0]))
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


def _read_object(fs: Any, store: S3Store | None, path: str, size: int) -> bytes | Exception:
    """One object, through obstore; through s3fs itself where that does not work.

    A request through s3fs costs nearly 3 ms of Python, through obstore a tenth of that.
    """
    bucket, key, _ = fs.split_path(path)
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
        _stores(fs)[bucket] = None
    return found


def _stores(fs: Any) -> dict[str, S3Store | None]:
    """Of each bucket, the connections that outlive a chunk.

    None where s3fs can read what obstore cannot: with a certificate of one's own, for instance.
    """
    # Kept on the file system itself: another one of equal options may lead to another server,
    # because it was opened in another environment.
    return vars(fs).setdefault("_gan_lib_stores", {})


def _store(fs: Any, path: str) -> S3Store | None:
    """The bucket of a path as obstore opens it; endpoint, region and keys are those of s3fs."""
    stores, bucket = _stores(fs), fs.split_path(path)[0]
    if bucket not in stores:
        try:
            stores[bucket] = _open_store(fs, bucket)
        # No credentials, or another way of signing: s3fs itself knows, or says what is missing.
        except Exception:
            return None
    return stores[bucket]


def _open_store(fs: Any, bucket: str) -> S3Store:
    client = sync(fs.loop, fs.set_session)
    endpoint = sync(fs.loop, fs._url, f"{bucket}/key").partition("?")[0].removesuffix("/key")
    in_path = endpoint.endswith(f"/{bucket}")

    def credentials() -> dict[str, Any]:
        found = sync(fs.loop, client._get_credentials().get_frozen_credentials)
        # Those of a role expire; s3fs renews them when it is asked again.
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": soon,
        }

    if not fs.anon:
        credentials()  # raises if there are none
    return S3Store(
        bucket,
        endpoint=endpoint.removesuffix(f"/{bucket}") if in_path else endpoint,
        virtual_hosted_style_request=not in_path,
        region=client.meta.region_name or "us-east-1",
        skip_signature=bool(fs.anon),
        credential_provider=None if fs.anon else credentials,
        client_options={
            "allow_http": endpoint.startswith("http:"),
            "connect_timeout": "5s",
            "read_timeout": f"{SECONDS_OF_SILENCE}s",
            "timeout": "1h",
        },
        # Tried again above, where the length of what came is seen too.
        retry_config={"max_retries": 0},
    )


def _about(seconds: float) -> float:
    # Workers that failed together should not come back together.
    return seconds * random.uniform(0.5, 1.5)
