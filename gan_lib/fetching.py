"""The bytes of many files at once: requests in flight together, each tried again if need be."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import aiohttp
import fsspec
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem
from yarl import URL

from gan_lib.listing import Source, cannot_be_read

# Requests at the same time, per process: a store answers after some 20 ms, and one core
# decodes 500 to 1,000 photographs a second.
IN_FLIGHT = 32
# Fetched while the ones before are decoded: the memory that waiting files may take.
CHUNK_FILES, CHUNK_BYTES = 128, 64 * 2**20
# Seconds before a request is tried again, give or take a half: together they outlast a store
# that asks for slowing down, and a network that is gone for a moment.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
# A response that stops flowing for so many seconds is given up.
SECONDS_OF_SILENCE = 10


def fetch_files(
    source: Source, paths: Sequence[str], sizes: Sequence[int]
) -> Iterator[list[bytes | str]]:
    """Read files, in chunks; while one chunk is used, the next is on its way.

    Args:
        source: says how to read them.
        paths: as its file system names them.
        sizes: in bytes, of each.

    Returns:
        For each chunk of `paths`, in order: the bytes of each file, or the reason why it has none.

    Raises:
        SourceError: if the source as a whole can no longer be read.
    """
    fs, root = source.open()
    with ThreadPoolExecutor(1) as pool:
        on_their_way: deque[Any] = deque()
        for start, stop in _chunks(sizes):
            chunk = slice(start, stop)
            on_their_way.append(pool.submit(_read, fs, paths[chunk], sizes[chunk]))
            if len(on_their_way) > 1:
                yield _settled(source, fs, root, on_their_way.popleft().result())
        while on_their_way:
            yield _settled(source, fs, root, on_their_way.popleft().result())


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and (i - start == CHUNK_FILES or total + size > CHUNK_BYTES):
            yield start, i
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _settled(
    source: Source,
    fs: fsspec.AbstractFileSystem,
    root: str,
    results: list[bytes | Exception],
) -> list[bytes | str]:
    """Reasons in place of errors; raises the errors that are not one file's own."""
    errors = [result for result in results if isinstance(result, Exception)]
    lost = [error for error in errors if not isinstance(error, FileNotFoundError)]
    if lost or len(errors) == len(results):
        # Is it these files, or everything? A key that has expired cannot list either.
        try:
            fs.invalidate_cache()
            fs.ls(root)
        except Exception:
            raise cannot_be_read(source, (lost or errors)[0]) from None
    return [
        _reason(source, result) if isinstance(result, Exception) else result for result in results
    ]


def _reason(source: Source, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "vanished between listing and reading"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {source.clean(said) or type(error).__name__}"


def _read(
    fs: fsspec.AbstractFileSystem, paths: Sequence[str], sizes: Sequence[int]
) -> list[bytes | Exception]:
    if isinstance(fs, LocalFileSystem):
        return [_read_one(fs, path) for path in paths]
    if "s3" in fs.protocol:
        return sync(fs.loop, _read_s3, fs, paths, sizes)
    found: dict[str, bytes | Exception] = {}
    missing = list(paths)
    for pause in (*PAUSES, 0.0):
        if isinstance(fs, AsyncFileSystem):
            found |= fs.cat(missing, on_error="return")
        else:
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                results = pool.map(lambda path: _read_one(fs, path), missing)
                found |= zip(missing, results, strict=True)
        missing = [path for path in missing if _may_come_back(found[path])]
        if not missing:
            break
        time.sleep(_about(pause))
    return [found[path] for path in paths]


def _may_come_back(result: bytes | Exception) -> bool:
    return isinstance(result, OSError) and not isinstance(result, FileNotFoundError)


def _read_one(fs: fsspec.AbstractFileSystem, path: str) -> bytes | Exception:
    try:
        return fs.cat_file(path)
    except Exception as error:
        return error


async def _read_s3(fs: Any, paths: Sequence[str], sizes: Sequence[int]) -> list[bytes | Exception]:
    session = _session(fs)
    turn = asyncio.Semaphore(IN_FLIGHT)
    try:
        signer = await _signer(fs, paths[0])
    # No credentials, or another way of signing: s3fs itself knows, or says what is missing.
    except Exception:
        signer = None

    async def read(path: str, size: int) -> bytes | Exception:
        async with turn:
            return await _read_object(fs, session, signer, path, size)

    return await asyncio.gather(*map(read, paths, sizes))


async def _read_object(
    fs: Any,
    session: aiohttp.ClientSession,
    signer: Callable[[str], AWSRequest] | None,
    path: str,
    size: int,
) -> bytes | Exception:
    """One object, by a plain signed request; by s3fs itself where that does not work.

    A request through s3fs costs some 3 ms of Python, most of it in botocore's resolving,
    hooks and parsing; signing and reading alone cost about half of that.
    """
    for pause in PAUSES if signer is not None else ():
        # Whatever fails for good is asked of s3fs below, which says why.
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
            request = signer(path)
            url = URL(request.url, encoded=True)
            async with session.get(url, headers=dict(request.headers.items())) as response:
                if response.status == 200:
                    data = await response.read()
                    if len(data) == size:
                        return data
                elif response.status < 500:
                    break
        await asyncio.sleep(_about(pause))
    try:
        return await fs._cat_file(path)
    except Exception as error:
        return error


async def _signer(fs: Any, path: str) -> Callable[[str], AWSRequest]:
    """Makes the signed request for a path; endpoint, region and keys are those of s3fs."""
    _, key, _ = fs.split_path(path)
    client = await fs.set_session()
    base = (await fs._url(path)).partition("?")[0].removesuffix(_quoted(key))
    auth = None
    if not fs.anon:
        credentials = await client._get_credentials().get_frozen_credentials()
        auth = S3SigV4Auth(credentials, "s3", client.meta.region_name)

    def sign(path: str) -> AWSRequest:
        key = fs.split_path(path)[1]
        request = AWSRequest("GET", base + _quoted(key))
        if auth is not None:
            auth.add_auth(request)
        return request

    return sign


def _quoted(key: str) -> str:
    return quote(key, safe="/~")


def _about(seconds: float) -> float:
    # Workers that failed together should not come back together.
    return seconds * random.uniform(0.5, 1.5)


# The connections to a store outlive a chunk.
_sessions: weakref.WeakKeyDictionary[Any, aiohttp.ClientSession] = weakref.WeakKeyDictionary()


def _session(fs: Any) -> aiohttp.ClientSession:
    if fs not in _sessions:
        session = _sessions[fs] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=IN_FLIGHT),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=None, sock_connect=5, sock_read=SECONDS_OF_SILENCE
            ),
            trust_env=True,
        )
        atexit.register(_close, fs.loop, session)
    return _sessions[fs]


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    with contextlib.suppress(Exception):
        sync(loop, session.close, timeout=1)
