"""Sources that are neither folders nor buckets: what they do not tell is asked for, or refused."""

from __future__ import annotations

import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_dirt import encoded

from gan_lib.base.errors import SourceError
from gan_lib.data.images import prepare_images
from gan_lib.sources import fetching, listing


class WebServer:
    """Serves a folder as web servers do, with the lists of links that they make.

    Attributes:
        url: of the folder.
        silent: names of headers that are not sent.
        refused: what is asked for first, so many times, is answered by 503.
        seen: how often each path was asked for by GET.
    """

    def __init__(self, folder: Path) -> None:
        self.silent: set[str] = set()
        self.refused = 0
        self.seen: Counter[str] = Counter()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.seen[self.path] += 1
                if not self.path.endswith("/") and server.seen[self.path] <= server.refused:
                    self.send_error(503)
                else:
                    super().do_GET()

            def send_header(self, keyword: str, value: str) -> None:
                if keyword not in server.silent:
                    super().send_header(keyword, value)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def colour(level: int) -> bytes:
    """Files of equal size."""
    return encoded(Image.new("L", (16, 16), level), "BMP")


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    folder = tmp_path / "dogs"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"{i}.bmp").write_bytes(colour(10 * i))
    return folder


@pytest.fixture
def web(dogs: Path) -> Iterator[WebServer]:
    server = WebServer(dogs)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def prepare(tmp_path: Path) -> Any:
    return partial(prepare_images, image_size=16, channels=1, cache=str(tmp_path / "cache"))


def levels(images: Any) -> list[int]:
    return np.asarray(images.pixels)[:, 0, 0, 0].tolist()


def test_images_replaced_behind_a_web_server_are_noticed(
    web: WebServer, dogs: Path, prepare: Any
) -> None:
    first = prepare(web.url)
    assert levels(first) == [0, 10, 20, 0, 10, 20]
    assert first.images_per_class() == {"a": 3, "b": 3}
    read = web.seen["/a/0.bmp"]
    assert prepare(web.url).prepared == first.prepared
    assert web.seen["/a/0.bmp"] == read
    (dogs / "a" / "0.bmp").write_bytes(colour(200))
    # The dates of the web are those of seconds.
    os.utime(dogs / "a" / "0.bmp", (time.time() + 9,) * 2)
    assert levels(prepare(web.url)) == [200, 10, 20, 0, 10, 20]


def test_images_replaced_in_memory_are_noticed(prepare: Any, tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}"
    store = fsspec.filesystem("memory")
    store.pipe(f"{place}/a/0.bmp", colour(10))
    assert levels(prepare(place)) == [10]
    store.pipe(f"{place}/a/0.bmp", colour(20))
    assert levels(prepare(place)) == [20]


def test_images_replaced_in_an_archive_are_noticed(prepare: Any, tmp_path: Path) -> None:
    for level in (10, 20):
        with zipfile.ZipFile(tmp_path / "dogs.zip", "w") as archive:
            archive.writestr("dogs/a/0.bmp", colour(level))
        assert levels(prepare(f"zip://dogs::{tmp_path}/dogs.zip")) == [level]


@pytest.mark.parametrize("silent", ["Last-Modified", "Content-Length"])
def test_files_of_which_too_little_is_told_are_refused(
    web: WebServer, prepare: Any, silent: str
) -> None:
    web.silent = {silent}
    with pytest.raises(SourceError, match=r"6 x its size or its version is not told: copy it to"):
        prepare(web.url)


def test_a_web_server_has_no_images_larger_than_others(
    web: WebServer, dogs: Path, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "LARGEST_FILE", 2**20)
    (dogs / "a" / "all.zip").write_bytes(b"\0" * (2**20 + 1))
    images = prepare(web.url)
    assert [(path.rsplit("/", 1)[1], why) for path, why in images.skipped] == [
        ("all.zip", "1 MB is no image file")
    ]
    assert web.seen["/a/all.zip"] == 0


def test_what_a_web_server_refuses_in_passing_is_asked_for_again(
    web: WebServer, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PAUSES", (0.01, 0.01))
    web.refused = 2
    assert levels(prepare(web.url)) == [0, 10, 20, 0, 10, 20]
