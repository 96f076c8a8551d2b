"""Many files are read ahead of those who use them: in order, each once, and never too many."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_shards import make_folder

from gan_lib.fetching import AHEAD, AHEAD_BYTES, fetch_files
from gan_lib.listing import Source

N = 3 * AHEAD + 1


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for i in range(N):
        (tmp_path / f"{i:04d}").write_bytes(b"%d" % i)
    return Source("numbers", str(tmp_path))


def paths(source: Source) -> list[str]:
    return [f"{source.url}/{i:04d}" for i in range(N)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [3, AHEAD_BYTES])
def test_each_file_once_and_in_order(source: Source, threads: int, size: int) -> None:
    used_by = set()

    def use(data: bytes, place: int) -> tuple[int, int]:
        used_by.add(threading.current_thread())
        return int(data), place

    found = fetch_files(source, paths(source), [size] * N, use, threads)
    assert found == [(i, i) for i in range(N)]
    # With helpers, they may have taken all before the caller came to it.
    assert threading.current_thread() in used_by or threads > 1
    assert len(used_by) <= threads
    assert fetch_files(source, [], []) == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [3, AHEAD_BYTES // 8])
def test_no_more_is_read_than_is_allowed(
    source: Source, monkeypatch: pytest.MonkeyPatch, threads: int, size: int
) -> None:
    fs, _ = source.open()
    lock, n_read, n_used, most = threading.Lock(), 0, 0, 0
    original = fs.cat_file

    def cat_file(path: str) -> bytes:
        nonlocal n_read, most
        with lock:
            n_read += 1
            most = max(most, n_read - n_used)
        return original(path)

    def use(data: bytes, place: int) -> None:
        nonlocal n_used
        with lock:
            n_used += 1

    monkeypatch.setattr(fs, "cat_file", cat_file)
    fetch_files(source, paths(source), [size] * N, use, threads)
    # Those that are being used, one by each thread, are no longer ahead.
    assert most <= min(AHEAD, AHEAD_BYTES // size) + threads
    assert n_read == n_used == N


@pytest.mark.parametrize("threads", [1, 3])
def test_what_goes_wrong_in_use_ends_it(source: Source, threads: int) -> None:
    used = []

    def use(data: bytes, place: int) -> None:
        used.append(place)
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        fetch_files(source, paths(source), [3] * N, use, threads)
    assert len(used) <= threads
    # Nothing is left behind that stands in the way of the next.
    assert fetch_files(source, paths(source), [3] * N) == [b"%d" % i for i in range(N)]


def test_a_file_that_is_gone_is_a_reason(source: Source) -> None:
    Path(source.url, "0007").unlink()
    found = fetch_files(source, paths(source), [3] * N, threads=2)
    assert found[7] == "vanished between listing and reading"
    assert [i for i, data in enumerate(found) if isinstance(data, str)] == [7]


def test_a_process_uses_the_cores_that_it_is_given(tmp_path: Path) -> None:
    code = """
import os, sys, threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from gan_lib.images import prepare_images

prepare_images(sys.argv[1], 16, cache=sys.argv[2], progress=False)
names = [thread.name for thread in threading.enumerate()]
print(sorted(name for name in names if name.startswith(("reading", "using"))))
"""
    folder = make_folder(tmp_path / "dogs")
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "cache"], capture_output=True, text=True
    )
    assert done.stdout == "['reading_0']\n", done.stderr
