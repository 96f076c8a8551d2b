"""python -m gan_lib data: fetching against a real HTTP server, verifying, preparing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_shards import make_folder

from gan_lib.__main__ import main
from gan_lib.base.progress import parse_progress
from gan_lib.sources import downloading, manifest
from gan_lib.sources.source import find_source

SCHEMA = json.loads(Path(__file__).parents[1].joinpath("data_manifest.schema.json").read_text())


def test_the_manifest_keeps_its_schema() -> None:
    jsonschema.validate(json.loads(manifest.manifest_text()), SCHEMA)
    for entry in manifest.sources().values():
        assert sum(entry["classes"].values()) == entry["images"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda dogs: dogs.pop("licence"),
        lambda dogs: dogs.pop("s3"),
        lambda dogs: dogs.update(package={"name": "dogs"}),
        lambda dogs: dogs["archives"]["images"].update(sha256="443f"),
        lambda dogs: dogs["classes"].update(beagle=0),
        lambda dogs: dogs.update(license="MIT"),
    ],
)
def test_the_schema_refuses(spoil: Callable[[dict[str, Any]], Any]) -> None:
    told = copy.deepcopy(json.loads(manifest.manifest_text()))
    spoil(told["sources"]["stanford-dogs"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(told, SCHEMA)


class Server:
    """Serves bytes; may cut an answer short, or know nothing of ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.cut_after: list[int] = []
        self.knows_ranges = True
        # Seconds between one piece of an answer and the next, and the size of a piece.
        self.pause, self.piece = 0.0, 2**30
        self.n_sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path not in server.files:
                    server.ranges.append(None)
                    self.send_error(404)
                    return
                data = server.files[self.path]
                asked = self.headers["Range"]
                server.ranges.append(asked)
                part = bool(asked) and server.knows_ranges
                start = int(asked.removeprefix("bytes=").rstrip("-")) if part else 0
                self.send_response(206 if part else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                stop = server.cut_after.pop(0) if server.cut_after else len(data)
                data = data[start : max(start, stop)]
                for at in range(0, len(data), server.piece):
                    time.sleep(server.pause)
                    with contextlib.suppress(ConnectionError):
                        server.n_sent += self.wfile.write(data[at : at + server.piece])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Server]:
    """Serves a source "dogs" of four images, which the manifest names."""
    server = Server()
    folder = make_folder(tmp_path / "made" / "Images", ["a", "b"], 2)
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    server.files["/images.tar"] = packed(lambda tar: tar.add(folder, "Images"))
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloading, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(manifest, "sources", lambda: {"dogs": entry_of(server)})
    yield server
    server.http.shutdown()
    server.http.server_close()


def packed(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        fill(tar)
    return buffer.getvalue()


def entry_of(server: Server) -> dict[str, Any]:
    data = server.files["/images.tar"]
    archive = {
        "url": f"{server.url}/images.tar",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return {
        "title": "Four dogs",
        "s3": {"url": "s3://nowhere/dogs", "anonymous": True},
        "archives": {"images": archive},
        "images": 4,
        "classes": {"a": 2, "b": 2},
        "licence": "MIT",
        "allows": "everything",
        "citation": "us",
    }


FETCH = ["data", "fetch", "dogs", "--archive", "images"]
# The command in a process of its own, with the manifest of the test.
COMMAND = """
import json, sys
from gan_lib.sources import manifest
entry = json.loads(sys.argv.pop(1))
manifest.sources = lambda: {"dogs": entry}
from gan_lib.__main__ import main
sys.exit(main())
"""


def start(server: Server) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, json.dumps(entry_of(server)), *FETCH]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fetched_once_then_used(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_source("dogs").url == "s3://nowhere/dogs"
    assert main(FETCH) == 0
    said = capsys.readouterr().out
    assert "allows everything" in said
    (line,) = filter(None, map(parse_progress, said.splitlines()))
    assert (line.description, line.text) == ("fetching", "images.tar")
    assert main(FETCH) == 0
    assert server.ranges == [None]
    place = tmp_path / "cache" / "sources" / "dogs"
    assert find_source("dogs").url == str(place / "Images")
    assert sorted(path.name for path in place.iterdir()) == ["Images", "images.lock"]
    assert main(["data", "list"]) == 0
    assert f"fetched: {place / 'Images'}" in capsys.readouterr().out
    assert main(["data", "prepare", "dogs", "--size", "16"]) == 0
    assert "4 images in 2 classes" in capsys.readouterr().out


def test_verify_names_what_differs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FETCH) == 0
    assert main(["data", "verify", "dogs"]) == 0
    folder = downloading.fetched_folder("dogs")
    (folder / "a" / "000.jpg").unlink()
    (folder / "c").mkdir()
    (folder / "b" / "000.jpg").rename(folder / "c" / "000.jpg")
    assert main(["data", "verify", "dogs"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "a: 1 images, expected 2",
        "b: 1 images, expected 2",
        "c: 1 images, expected 0",
    ]


def test_verify_reads_every_file_of_any_folder(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "mine", ["brave", "shy"], 3)
    assert main(["data", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"{folder}: 6 images",
        "  brave: 3",
        "  shy: 3",
    ]
    (folder / "shy" / "notes.jpg").write_text("no image")
    assert main(["data", "verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert f"skipped: file://{folder}/shy/notes.jpg: not an image" in said
    assert "brave: 3" in said
    assert main(["data", "prepare", str(folder), "--size", "16"]) == 0
    assert f"skipped: file://{folder}/shy/notes.jpg: " in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_broken_download_goes_on_where_it_broke(server: Server) -> None:
    server.cut_after = [1000, 5000]
    assert main(FETCH) == 0
    assert server.ranges == [None, "bytes=1000-", "bytes=5000-"]


def test_so_it_does_in_another_process(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.cut_after = [1000, 1000, 1000]
    assert main(FETCH) == 2
    assert "what has come so far is kept" in capsys.readouterr().err
    assert main(FETCH) == 0
    assert server.ranges[-1] == "bytes=1000-"


def test_a_link_in_the_place_of_a_download_is_not_followed(server: Server, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("not to be lost")
    part = downloading.fetched_folder("dogs").parent / "images.tar.part"
    part.parent.mkdir(parents=True)
    part.symlink_to(precious)
    assert main(["data", "fetch", "dogs", "--archive", "images"]) == 2
    assert precious.read_text() == "not to be lost"


def test_two_processes_fetch_an_archive_once(server: Server) -> None:
    data = server.files["/images.tar"]
    server.pause, server.piece = 0.05, len(data) // 20
    first = start(server)
    wait_for(lambda: server.n_sent > 0)
    second = start(server)
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "another process is fetching images of dogs: waiting for it" in said[1]
    assert (server.ranges, server.n_sent) == ([None], len(data))
    assert left_in(downloading.fetched_folder("dogs").parent) == ["Images", "images.lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_is_taken_up_where_it_was(server: Server, number: int) -> None:
    data = server.files["/images.tar"]
    server.pause, server.piece = 0.05, len(data) // 20
    process = start(server)
    wait_for(lambda: server.n_sent > len(data) // 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, said
    folder = downloading.fetched_folder("dogs").parent
    assert left_in(folder) == ["images.lock", "images.tar.part"]
    size = (folder / "images.tar.part").stat().st_size
    assert size >= len(data) // 2 - server.piece
    assert main(FETCH) == 0
    assert server.ranges == [None, f"bytes={size}-"]
    assert left_in(folder) == ["Images", "images.lock"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fetch_interrupted_at_twenty_random_moments(
    server: Server, number: int, tmp_path: Path
) -> None:
    folder = tmp_path / "many" / "Images"
    make_folder(folder, ["a", "b"], 1_000)
    server.files["/images.tar"] = packed(lambda tar: tar.add(folder, "Images"))
    data = server.files["/images.tar"]
    server.pause, server.piece = 0.02, len(data) // 40
    place = downloading.fetched_folder("dogs").parent
    began = time.monotonic()
    assert start(server).wait(60) == 0
    whole = time.monotonic() - began
    rng = random.Random(number)
    for _ in range(20):
        shutil.rmtree(place)
        server.ranges.clear()
        process = start(server)
        time.sleep(rng.uniform(0, whole))
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        there = left_in(place)
        if "Images" not in there:
            assert set(there) <= {"images.lock", "images.tar.part"}, said
        part = place / "images.tar.part"
        size = part.stat().st_size if part.exists() else 0
        asked = len(server.ranges)
        assert main(FETCH) == 0
        if "Images" in there or size == len(data):
            assert len(server.ranges) == asked
        else:
            assert server.ranges[asked:] == [f"bytes={size}-" if size else None]
        assert left_in(place) == ["Images", "images.lock"]
        assert sum(path.is_file() for path in (place / "Images").rglob("*")) == 2_000


def test_what_a_killed_fetch_has_left_goes(server: Server) -> None:
    folder = downloading.fetched_folder("dogs").parent
    (folder / "images.tar.unpacking" / "Images").mkdir(parents=True)
    assert main(FETCH) == 0
    # Killed after the folder was put in place, before the archive went.
    (folder / "images.tar.part").write_bytes(server.files["/images.tar"])
    assert main(FETCH) == 0
    assert left_in(folder) == ["Images", "images.lock"]
    assert server.ranges == [None]


def test_a_server_that_knows_no_ranges(server: Server) -> None:
    server.knows_ranges, server.cut_after = False, [1000]
    assert main(FETCH) == 0


def test_what_is_no_longer_there_is_asked_for_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = entry_of(server)
    entry["archives"]["images"]["url"] += ".old"
    monkeypatch.setattr(manifest, "sources", lambda: {"dogs": entry})
    assert main(FETCH) == 2
    assert "images.tar.old cannot be fetched: HTTP Error 404" in capsys.readouterr().err
    assert server.ranges == [None]


def test_more_than_there_should_be_is_fetched_anew(server: Server) -> None:
    part = downloading.fetched_folder("dogs").parent / "images.tar.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files["/images.tar"] + b"more")
    assert main(FETCH) == 0
    assert server.ranges == [None]


def test_another_file_is_not_unpacked(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = entry_of(server)
    entry["archives"]["images"]["sha256"] = "0" * 64
    monkeypatch.setattr(manifest, "sources", lambda: {"dogs": entry})
    assert main(FETCH) == 2
    assert f"expected {'0' * 64}" in capsys.readouterr().err
    assert left_in(downloading.fetched_folder("dogs").parent) == ["images.lock"]


def evil(**changes: Any) -> Callable[[tarfile.TarFile], None]:
    def fill(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("Images/a/dog.jpg")
        for name, value in changes.items():
            setattr(info, name, value)
        tar.addfile(info)

    return fill


@pytest.mark.parametrize(
    "fill",
    [
        evil(name="../evil.jpg"),
        evil(name="Images/../../../evil.jpg"),
        evil(type=tarfile.SYMTYPE, linkname="/etc"),
        evil(type=tarfile.SYMTYPE, linkname="../../../.."),
        evil(type=tarfile.LNKTYPE, linkname="../../evil"),
        evil(type=tarfile.CHRTYPE),
        evil(type=tarfile.FIFOTYPE),
    ],
)
def test_what_does_not_belong_there_is_refused(
    fill: Callable[[tarfile.TarFile], None],
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.files["/images.tar"] = packed(fill)
    assert main(FETCH) == 2
    assert "was not unpacked" in capsys.readouterr().err
    left = [path.name for path in (tmp_path / "cache").rglob("*")]
    assert sorted(left) == ["dogs", "images.lock", "images.tar.part", "sources"]


def test_mistakes_end_in_one_sentence(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "fetch", "cats"]) == 2
    assert "no archive of 'cats' to fetch: there is dogs" in capsys.readouterr().err
    assert main(["data", "fetch", "dogs", "--archive", "lists"]) == 2
    assert "it has images" in capsys.readouterr().err
    assert main(["data", "prepare", "dogs", "--size", "65"]) == 2
    assert "image_size is 65" in capsys.readouterr().err
    entry = entry_of(server)
    entry["archives"]["images"]["bytes"] = 2**60
    monkeypatch.setattr(manifest, "sources", lambda: {"dogs": entry})
    assert main(FETCH) == 2
    assert "make room" in capsys.readouterr().err
