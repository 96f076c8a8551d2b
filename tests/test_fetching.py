"""Many files are read ahead of those who use them: in order, each once, and never too many."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_shards import make_folder

from gan_lib.sources import fetching
from gan_lib.sources.fetching import AHEAD, Unread, fetch_files
from gan_lib.sources.source import Source

N, SIZE = 3 * AHEAD + 1, 3


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for i in range(N):
        (tmp_path / f"{i:04d}").write_bytes(b"%03d" % i)
    return Source("numbers", str(tmp_path))


def paths(source: Source) -> list[str]:
    return [f"{source.url}/{i:04d}" for i in range(N)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [1, AHEAD])
def test_each_file_once_and_in_order(
    source: Source, monkeypatch: pytest.MonkeyPatch, threads: int, at_once: int
) -> None:
    monkeypatch.setattr(fetching, "AHEAD_BYTES", at_once * SIZE)
    used_by = set()

    def use(data: bytes, place: int) -> tuple[int, int]:
        used_by.add(threading.current_thread())
        return int(data), place

    found = fetch_files(source, paths(source), [SIZE] * N, use, threads)
    assert found == [(i, i) for i in range(N)]
    # With helpers, they may have taken all before the caller came to it.
    assert threading.current_thread() in used_by or threads > 1
    assert len(used_by) <= threads
    assert fetch_files(source, [], []) == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [8, AHEAD])
def test_no_more_is_read_than_is_allowed(
    source: Source, monkeypatch: pytest.MonkeyPatch, threads: int, at_once: int
) -> None:
    monkeypatch.setattr(fetching, "AHEAD_BYTES", at_once * SIZE)
    fs = source.fs
    lock, n_read, n_used, most = threading.Lock(), 0, 0, 0
    original = fs.cat_file

    def cat_file(path: str, **options: int) -> bytes:
        nonlocal n_read, most
        with lock:
            n_read += 1
            most = max(most, n_read - n_used)
        return original(path, **options)

    def use(data: bytes, place: int) -> None:
        nonlocal n_used
        with lock:
            n_used += 1

    monkeypatch.setattr(fs, "cat_file", cat_file)
    fetch_files(source, paths(source), [SIZE] * N, use, threads)
    # Those that are being used, one by each thread, are no longer ahead.
    assert most <= at_once + threads
    assert n_read == n_used == N


@pytest.mark.parametrize("threads", [1, 3])
def test_what_goes_wrong_in_use_ends_it(source: Source, threads: int) -> None:
    used = []

    def use(data: bytes, place: int) -> None:
        used.append(place)
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        fetch_files(source, paths(source), [SIZE] * N, use, threads)
    assert len(used) <= threads
    # Nothing is left behind that stands in the way of the next.
    assert fetch_files(source, paths(source), [SIZE] * N) == [b"%03d" % i for i in range(N)]


def test_a_file_that_is_gone_is_a_reason(source: Source) -> None:
    Path(source.url, "0007").unlink()
    found = fetch_files(source, paths(source), [SIZE] * N, threads=2)
    assert found[7] == "vanished between listing and reading"
    assert [i for i, data in enumerate(found) if isinstance(data, str)] == [7]


def test_no_more_of_a_file_is_read_than_was_listed(source: Source) -> None:
    Path(source.url, "0003").write_bytes(b"1" * 10**6)
    Path(source.url, "0004").write_bytes(b"1")
    Path(source.url, "0005").write_bytes(b"")
    read = fsspec.spec.AbstractFileSystem.cat_file
    lengths = []

    def cat_file(*arguments: Any, **options: Any) -> bytes:
        data = read(*arguments, **options)
        lengths.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFileSystem, "cat_file", cat_file)
        found = fetch_files(source, paths(source), [SIZE] * N)
    assert max(lengths) == SIZE + 1
    assert [i for i, data in enumerate(found) if isinstance(data, Unread)] == [3, 4, 5]
    assert {found[i] for i in (3, 4, 5)} == {
        "cannot be read: it was changed between listing and reading"
    }


def test_a_process_uses_the_cores_that_it_is_given(tmp_path: Path) -> None:
    code = """
import os, sys, threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from gan_lib.data import prepare_images

prepare_images(sys.argv[1], 16, cache=sys.argv[2], progress=False)
names = [thread.name for thread in threading.enumerate()]
print(sorted(name for name in names if name.startswith(("reading", "using"))))
"""
    folder = make_folder(tmp_path / "dogs")
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "cache"], capture_output=True, text=True
    )
    assert done.stdout == "['reading_0']\n", done.stderr
