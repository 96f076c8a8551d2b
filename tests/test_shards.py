"""Images are prepared once: in shards, by many at once, and made anew when they change."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from distributed import Client
from PIL import Image
from uploading import upload

from gan_lib.base.errors import SourceError
from gan_lib.base.storage import Folder
from gan_lib.data import images as images_module
from gan_lib.data import shards
from gan_lib.data.decoding import decode_image, read_boxes
from gan_lib.data.images import (
    CacheNotSharedError,
    SkippedFilesWarning,
    open_prepared,
    prepare_images,
)
from gan_lib.data.prepared import INDEX
from gan_lib.data.shards import ImageRecipe, cut_into_shards

ANNOTATION = """<annotation><object><name>dog</name><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"""


def make_folder(folder: Path, classes: Sequence[str] = ("a", "b", "c"), n: int = 40) -> Path:
    """Class folders of small images, each of a colour of its own."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            colour = tuple(rng.integers(256, size=3).tolist())
            Image.new("RGB", (24, 20), colour).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards of the 120 images of `make_folder`."""
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 32 * shards.COST_OF_FILE)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_the_second_call_opens_what_the_first_made(tmp_path: Path, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs")
    first = prepare_images(str(folder), 16, cache=cache)
    times = {path: path.stat().st_mtime_ns for path in Path(first.prepared).iterdir()}
    second = prepare_images(str(folder), 16, cache=cache)
    assert times == {path: path.stat().st_mtime_ns for path in Path(first.prepared).iterdir()}
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert first.checksum() == second.checksum()
    assert second.images_per_class() == {"a": 40, "b": 40, "c": 40}
    index = json.loads(Path(first.prepared, INDEX).read_text())
    assert (index["count"], index["source"], len(index["shards"])) == (120, str(folder), 4)
    # One file of pixels is all that is left.
    assert sorted(path.suffix for path in times) == [".json", ".lock", ".npy"]
    # To another process they travel as their address.
    assert len(pickle.dumps(first)) < 1_000
    assert pickle.loads(pickle.dumps(first)).checksum() == first.checksum()


def test_made_anew_when_something_changes(tmp_path: Path, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs", ["a"], 5)
    places = {prepare_images(str(folder), 16, cache=cache).prepared}
    places.add(prepare_images(str(folder), 32, cache=cache).prepared)
    places.add(prepare_images(str(folder), 16, channels=1, cache=cache).prepared)
    places.add(prepare_images(str(folder), 16, crop="squash", cache=cache).prepared)
    places.add(prepare_images(str(folder), 16, max_images=3, cache=cache).prepared)
    Image.new("RGB", (9, 9), "white").save(folder / "a" / "000.png")
    changed = prepare_images(str(folder), 16, cache=cache)
    assert changed.pixels[0].min() == 255
    places.add(changed.prepared)
    (folder / "a" / "001.png").unlink()
    places.add(prepare_images(str(folder), 16, cache=cache).prepared)
    assert len(places) == 7


def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "dogs")
    made = []
    original = images_module.make_shard

    def only_two(work: object, url: str) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(work)
        return original(work, url)  # type: ignore[arg-type]

    monkeypatch.setattr(images_module, "make_shard", only_two)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(str(folder), 16, cache=cache)
    made.clear()
    assert len(prepare_images(str(folder), 16, cache=cache)) == 120
    assert [work.number for work in made] == [2, 3]


def test_what_a_killed_process_has_half_written_is_deleted_by_the_next(
    tmp_path: Path, cache: str, killed_writer: Callable[[Path, str], Path]
) -> None:
    folder = make_folder(tmp_path / "dogs")
    prepared = Path(prepare_images(str(folder), 16, cache=cache).prepared)
    (prepared / INDEX).unlink()
    killed_writer(prepared, "shard_0002.npy")
    killed_writer(prepared, next(prepared.glob("*.npy")).name)
    # Another machine may still be writing: it does not see the lock of this one.
    elsewhere = prepared / f"shard_0002.npy.{'0' * 12}.{'0' * 32}.part"
    elsewhere.touch()
    prepare_images(str(folder), 16, cache=cache)
    assert list(prepared.rglob("*.part")) == [elsewhere]


@pytest.mark.parametrize("damage", ["lost", "cut", "emptied"])
def test_damaged_pixels_are_made_again(tmp_path: Path, cache: str, damage: str) -> None:
    folder = make_folder(tmp_path / "dogs")
    whole = prepare_images(str(folder), 16, cache=cache)
    expected = np.array(whole.pixels)
    (pixels,) = Path(whole.prepared).glob("pixels-*.npy")
    data = pixels.read_bytes()
    pixels.unlink()
    if damage != "lost":
        pixels.write_bytes(data[:100] if damage == "cut" else b"")
    with pytest.raises(SourceError, match=r"damaged.*shard_0000.*prepare_images again"):
        pickle.loads(pickle.dumps(whole))
    np.testing.assert_array_equal(prepare_images(str(folder), 16, cache=cache).pixels, expected)


def test_two_processes_at_once(tmp_path: Path, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs")
    code = (
        "import sys; from gan_lib.data.images import prepare_images; "
        "print(prepare_images(sys.argv[1], 16, cache=sys.argv[2], progress=False).checksum())"
    )
    command = [sys.executable, "-c", code, str(folder), cache]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert said == {prepare_images(str(folder), 16, cache=cache).checksum() + "\n"}
    assert not list(Path(cache).rglob("*.part"))


def test_who_waits_for_another_process_says_so(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_folder(tmp_path / "dogs"))
    folder = Folder(prepare_images(source, 16, cache=cache).prepared)
    folder.remove(INDEX)
    with ThreadPoolExecutor(1) as pool:
        with folder.locked("preparing.lock"):
            waits = pool.submit(prepare_images, source, 16, cache=cache)
            while "another process prepares these images" not in capsys.readouterr().out:
                assert not waits.done()
                time.sleep(0.01)
        assert len(waits.result()) == 120


def test_workers_prepare_the_same(tmp_path: Path, cache: str, client: Client) -> None:
    folder = make_folder(tmp_path / "dogs")
    here = prepare_images(str(folder), 16, cache=cache)
    there = prepare_images(str(folder), 16, cache=f"{cache}2", client=client)
    np.testing.assert_array_equal(here.pixels, there.pixels)
    assert here.checksum() == there.checksum()
    assert sum(client.run(os.getpid).values())  # the workers are alive and free


def test_a_cache_that_workers_do_not_see(tmp_path: Path, client: Client) -> None:
    folder = make_folder(tmp_path / "dogs", ["a"], 2)
    with pytest.raises(CacheNotSharedError, match=r"worker tls://.*does not see.*GAN_LIB_CACHE"):
        prepare_images(str(folder), 16, cache="memory://mine", client=client)


def test_a_source_that_workers_do_not_see(tmp_path: Path, client: Client) -> None:
    fsspec.filesystem("memory").pipe_file("/dogs/a/1.jpg", b"only here")
    with pytest.raises(SourceError, match=r"worker tls://\S+ cannot read .*memory://dogs"):
        prepare_images("memory://dogs", 16, cache=str(tmp_path), client=client)


def test_a_cache_on_s3_is_copied_once(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "dogs")
    place = f"{s3}/cache-{time.time_ns()}"
    first = prepare_images(str(folder), 16, cache=place)
    expected = prepare_images(str(folder), 16, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(first.pixels, expected.pixels)
    # Another machine has a cache of its own.
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "another"))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first)).pixels, expected.pixels)
    copies = list((tmp_path / "another").rglob("*.npy"))
    assert len(copies) == 1


@pytest.fixture
def on_s3(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A preparation in a cache on S3, as machines without a copy of it see it."""
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "here"))
    source, cache = str(make_folder(tmp_path / "dogs")), f"{s3}/cache-{time.time_ns()}"
    images = prepare_images(source, 16, cache=cache)
    pixels = np.array(images.pixels)
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "another"))
    return Prepared(source, cache, images.prepared, pixels)


@dataclass
class Prepared:
    source: str
    cache: str
    url: str
    pixels: np.ndarray

    def index(self) -> dict[str, Any]:
        return json.loads(fsspec.filesystem("s3").cat_file(f"{self.url}/{INDEX}"))

    def write(self, name: str, data: bytes) -> None:
        fsspec.filesystem("s3").pipe_file(f"{self.url}/{name}", data)

    def again(self) -> np.ndarray:
        return prepare_images(self.source, 16, cache=self.cache).pixels


@pytest.mark.parametrize("damage", ["missing", "cut", "exchanged", "all missing"])
def test_damaged_shards_elsewhere_are_made_again(on_s3: Prepared, damage: str) -> None:
    fs = fsspec.filesystem("s3")
    for number in range(4 if damage == "all missing" else 2):
        shard = f"{on_s3.url}/shard_000{number}.npy"
        data = fs.cat_file(shard)
        if "missing" in damage:
            fs.rm(shard)
        else:
            fs.pipe_file(shard, data[:100] if damage == "cut" else data[:-1] + b"!")
    with pytest.raises(SourceError, match=r"damaged \(shard_0000.npy, shard_0001.*call prepare_im"):
        open_prepared(on_s3.url)
    np.testing.assert_array_equal(on_s3.again(), on_s3.pixels)
    np.testing.assert_array_equal(open_prepared(on_s3.url).pixels, on_s3.pixels)


def test_a_copy_that_cannot_be_made_is_one_sentence(on_s3: Prepared, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "copies").touch()
    for call in (lambda: open_prepared(on_s3.url), on_s3.again):
        with pytest.raises(SourceError, match=r"cannot be written .*copies.* GAN_LIB_CACHE"):
            call()


def test_a_copy_is_never_taken_for_other_pixels(on_s3: Prepared) -> None:
    old = open_prepared(on_s3.url)
    # A shard of the same size takes the place of another, and the index says so.
    other = io.BytesIO()
    np.save(other, np.full((30, 16, 16, 3), 77, np.uint8))
    on_s3.write("shard_0001.npy", other.getvalue())
    index = on_s3.index()
    index["shards"][1]["sha256"] = hashlib.sha256(other.getvalue()).hexdigest()
    on_s3.write(INDEX, json.dumps(index).encode())
    new = open_prepared(on_s3.url)
    assert new.checksum() != old.checksum()
    assert (new.pixels[30:60] == 77).all()
    np.testing.assert_array_equal(new.pixels[:30], old.pixels[:30])


@pytest.mark.parametrize("name", ["../../planted.npy", "planted.npy"])
def test_an_index_does_not_say_where_files_go(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = str(make_folder(tmp_path / "dogs")), f"memory://cache-{time.time_ns()}"
    images = prepare_images(source, 16, cache=cache)
    folder = Folder(images.prepared)
    index = json.loads(folder.read(INDEX))
    folder.write(name, folder.read("shard_0000.npy"))
    index["shards"][0]["file"] = name
    folder.write(INDEX, json.dumps(index).encode())
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "another"))
    with pytest.raises(SourceError, match="there are no prepared images at"):
        open_prepared(images.prepared)
    assert not list(tmp_path.rglob("planted.npy"))
    # Nor does what is said of a shard.
    info = {**json.loads(folder.read("shard_0001.json")), "file": name}
    folder.write("shard_0001.json", json.dumps(info).encode())
    folder.remove("shard_0002.npy")
    folder.write(name, b"cut")
    folder.write(name.replace(".npy", ".json"), b"{}")
    again = prepare_images(source, 16, cache=cache)
    assert again.checksum() == images.checksum()
    assert (folder.read(name), folder.read(name.replace(".npy", ".json"))) == (b"cut", b"{}")


def test_as_many_images_as_were_asked_for(tmp_path: Path, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs")
    # Those that are taken first are no images, others are.
    files = sorted(folder.rglob("*.png"))
    for i in (0, 60, 119):
        files[i].write_text("no image")
    three = prepare_images(str(folder), 16, max_images=3, cache=cache)
    assert len(three) == len(three.labels) == 3
    assert {Path(url).name for url, _ in three.skipped} == {"000.png", "020.png", "039.png"}
    assert three.checksum() == prepare_images(str(folder), 16, max_images=3, cache=cache).checksum()
    # What takes the place of others comes last, and each image has its own label.
    some = prepare_images(str(folder), 16, max_images=110, cache=cache)
    assert len(some) == 110
    good = [file for i, file in enumerate(files) if i not in (0, 60, 119)]
    labels = {Image.open(file).getpixel((0, 0)): "abc".index(file.parent.name) for file in good}
    assert [labels[tuple(image[0, 0].tolist())] for image in some.pixels] == some.labels.tolist()
    # Where there are not enough, there are all.
    with_all = prepare_images(str(folder), 16, max_images=119, cache=cache)
    assert with_all.images_per_class() == {"a": 39, "b": 39, "c": 39}


def test_shards_do_not_depend_on_who_makes_them(tmp_path: Path) -> None:
    from gan_lib.sources.listing import list_files
    from gan_lib.sources.source import find_source

    files = list_files(find_source(str(make_folder(tmp_path / "dogs", n=50))))
    works = cut_into_shards(files, ImageRecipe(16))
    assert [path for work in works for path in work.paths] == list(files.paths)
    # As even as can be: 150 files in shards of at most 32.
    assert [len(work.paths) for work in works] == [30] * 5
    # A hundred photographs straight from a camera are work for many.
    large = replace(files.chosen(list(range(100))), sizes=(4 * 2**20,) * 100)
    assert {len(work.paths) for work in cut_into_shards(large, ImageRecipe(16))} == {1, 2}


def test_pixels_are_an_array(tmp_path: Path, cache: str) -> None:
    pixels = prepare_images(str(make_folder(tmp_path / "dogs")), 16, cache=cache).pixels
    assert (type(pixels), pixels.shape, pixels.dtype) == (np.ndarray, (120, 16, 16, 3), np.uint8)
    assert pixels.ravel().shape == (120 * 16 * 16 * 3,)
    assert 0 < (pixels / 255).std() < 1
    assert pixels[::40, 0, 0, 1].tolist() == [image[0, 0, 1] for image in pixels[[0, 40, 80]]]
    assert pixels[pixels.mean(axis=(1, 2, 3)) > 128].shape[1:] == (16, 16, 3)


def test_boxes(tmp_path: Path, cache: str) -> None:
    # A white square in a black photograph, and a box around it.
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[20:60, 140:180] = 255
    images, boxes = tmp_path / "Images" / "beagle", tmp_path / "Annotation" / "beagle"
    images.mkdir(parents=True)
    boxes.mkdir(parents=True)
    for name in ("dog", "no-box", "bad-box"):
        Image.fromarray(picture).save(images / f"{name}.png")
    (boxes / "dog").write_text(ANNOTATION.format(140, 20, 180, 60))
    (boxes / "bad-box").write_text("<annotation>")
    with pytest.warns(SkippedFilesWarning):
        found = prepare_images(str(tmp_path / "Images"), 16, crop="box", cache=cache)
    assert len(found) == 1
    # The resize looks a little beyond the edge of the box.
    assert found.pixels[0].min() > 190
    assert found.pixels[0][1:-1, 1:-1].min() == 255
    reasons = {Path(url).name: why for url, why in found.skipped}
    assert reasons["no-box.png"] == "no annotated box"
    assert "annotation cannot be read" in reasons["bad-box.png"]
    # The boxes may lie anywhere, if it is said where.
    (tmp_path / "Annotation").rename(tmp_path / "boxes")
    with pytest.warns(SkippedFilesWarning):
        there = prepare_images(
            str(tmp_path / "Images"), 16, crop="box", cache=cache,
            annotation=str(tmp_path / "boxes"),
        )  # fmt: skip
    assert there.checksum() == found.checksum()
    # A wide box becomes a square that shows all of it, and stays within the photograph.
    data = (images / "dog.png").read_bytes()
    wide = decode_image(
        data, 16, 1, "box", read_boxes(ANNOTATION.format(120, 30, 200, 50).encode())[0]
    )
    assert 0.2 < (wide > 128).mean() < 0.3
    with pytest.raises(
        SourceError, match=r"needs the annotated boxes.*data fetch --archive annotation"
    ):
        prepare_images(str(make_folder(tmp_path / "x" / "y", ["a"], 1)), 16, crop="box")


def test_links_and_other_odd_things(tmp_path: Path, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs", ["a"], 30)
    outside = make_folder(tmp_path / "elsewhere", ["x"], 1)
    (folder / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "a" / "circle").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "linked").symlink_to(outside / "x")
    (folder / "none").mkdir()
    os.mkfifo(folder / "a" / "pipe.jpg")
    os.link(folder / "a" / "000.png", folder / "a" / os.fsdecode(b"\xff name.png"))
    found = prepare_images(str(folder), 16, cache=cache, progress=False)
    assert found.images_per_class() == {"a": 31, "linked": 1}
    reasons = {os.path.basename(url): why for url, why in found.skipped}
    assert set(reasons) == {"nowhere.jpg", "itself.jpg", "circle", "above", "none", "pipe.jpg"}
    assert "leads nowhere" in reasons["nowhere.jpg"]
    assert "circle" in reasons["circle"]


def test_wrong_keys_are_one_sentence(s3: str, tmp_path: Path) -> None:
    options = {"key": "wrong-key", "secret": "wrong-secret", "client_kwargs": {}}
    with pytest.raises(SourceError, match=r"cannot be read.*AWS_ACCESS_KEY_ID") as caught:
        prepare_images(f"{s3}/dogs", 16, storage_options=options)
    assert "wrong-secret" not in str(caught.value)
    assert "wrong-key" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_odd_names_on_s3(tmp_path: Path, s3: str, cache: str) -> None:
    folder = make_folder(tmp_path / "dogs", ["über 犬", "a+b & c=d%20"], 2)
    (folder / "a+b & c=d%20" / "000.png").rename(folder / "a+b & c=d%20" / "é ~ 🐕 (1).png")
    place = f"{s3}/odd-{time.time_ns()}"
    upload(folder, place)
    there, here = prepare_images(place, 16, cache=cache), prepare_images(str(folder), 16)
    assert there.images_per_class() == here.images_per_class()
    np.testing.assert_array_equal(there.pixels, here.pixels)
