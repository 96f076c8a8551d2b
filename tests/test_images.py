from __future__ import annotations

import pickle
import socket
from pathlib import Path

import fsspec
import numpy as np
import pytest
from obstore.store import MemoryStore
from PIL import Image
from uploading import upload

from gan_lib.base.errors import ParameterError, SourceError
from gan_lib.data import decoding
from gan_lib.data.checking import check_source
from gan_lib.data.decoding import decode_image
from gan_lib.data.images import prepare_images
from gan_lib.practice.photographs import make_photographs
from gan_lib.practice.s3_server import serve_s3
from gan_lib.sources import embedded, listing, manifest
from gan_lib.sources.object_store import list_objects
from gan_lib.sources.source import find_source

BOX = (60.0, 50.0, 260.0, 310.0)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def gradient(height: int, width: int) -> np.ndarray:
    """Dark on the left, light on the right."""
    return np.repeat(np.linspace(0, 255, width)[None].astype(np.uint8), height, axis=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "dogs" / "beagle" / "a.png", gradient(40, 60))
    save(tmp_path / "dogs" / "beagle" / "b.jpg", gradient(60, 40))
    save(tmp_path / "dogs" / "spaniel" / "ü 犬 🐕.png", gradient(16, 16))
    return tmp_path / "dogs"


def test_embedded_silhouettes() -> None:
    dogs = prepare_images("dog-silhouettes", 32, channels=1)
    assert dogs.pixels.shape == (1000, 32, 32, 1)
    assert dogs.pixels.dtype == np.uint8
    assert dogs.classes == ("dog",)
    assert dogs.skipped == ()
    # White animals on black: both are there.
    assert dogs.pixels.min() == 0
    assert dogs.pixels.max() == 255
    rgb = prepare_images("dog-silhouettes", 32, channels=3, max_images=10)
    assert rgb.pixels.shape == (10, 32, 32, 3)


def test_folder_of_class_folders(folder: Path) -> None:
    dogs = prepare_images(str(folder), 16, channels=3)
    assert dogs.pixels.shape == (3, 16, 16, 3)
    assert dogs.classes == ("beagle", "spaniel")
    assert dogs.images_per_class() == {"beagle": 2, "spaniel": 1}
    assert dogs.skipped == ()


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    save(tmp_path / "mine" / "a.png", gradient(16, 16))
    assert prepare_images(str(tmp_path / "mine"), 16).classes == ("mine",)


def test_what_is_not_an_image_is_skipped_with_its_reason(folder: Path) -> None:
    (folder / "beagle" / "notes.jpg").write_text("not a picture")
    (folder / "beagle" / "empty.png").write_bytes(b"")
    whole = (folder / "beagle" / "b.jpg").read_bytes()
    (folder / "beagle" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    dogs = prepare_images(str(folder), 16)
    assert len(dogs) == 3
    reasons = {url.rsplit("/", 1)[1]: reason for url, reason in dogs.skipped}
    assert reasons["notes.jpg"] == "not an image"
    assert reasons["empty.png"] == "the file is empty"
    assert "truncated" in reasons["cut.jpg"].lower()


def test_proportions_are_kept_by_cutting(tmp_path: Path) -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 15:45] = 255  # the middle is white, and all that a centre crop sees
    save(tmp_path / "wide.png", wide)
    data = (tmp_path / "wide.png").read_bytes()
    assert decode_image(data, 16, 1, "center").min() == 255
    assert decode_image(data, 16, 1, "squash").min() == 0


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(32, 32))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down: left and right change places
    save(tmp_path / "turned.jpg", image, exif=exif)
    pixels = decode_image((tmp_path / "turned.jpg").read_bytes(), 16, 1)
    assert pixels[:, 0].mean() > 200 > 50 > pixels[:, -1].mean()


@pytest.mark.parametrize("size", [16, 64, 200])
@pytest.mark.parametrize("crop", ["center", "squash", "box"])
def test_pillow_decodes_a_jpeg_to_the_same_pixels(
    size: int, crop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = sorted(make_photographs(tmp_path, n=20, dirt=False).rglob("*.jpg"))
    files = [path.read_bytes() for path in photographs]
    assert all(decoding._decode_jpeg(data, size, 3, crop, BOX) is not None for data in files)
    quick = [decode_image(data, size, 3, crop, BOX) for data in files]
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: None)
    np.testing.assert_array_equal(quick, [decode_image(data, size, 3, crop, BOX) for data in files])


def test_colour_modes_mean_the_same(tmp_path: Path) -> None:
    grey = gradient(32, 32)
    expected = decode_image(_bytes(tmp_path, Image.fromarray(grey), "png"), 16, 1).astype(int)
    clear = Image.fromarray(np.stack([np.zeros_like(grey), 255 - grey], axis=-1), "LA")
    variants = {
        "rgb": _bytes(tmp_path, Image.fromarray(grey).convert("RGB"), "png"),
        "palette": _bytes(tmp_path, Image.fromarray(grey).convert("P"), "png"),
        "cmyk": _bytes(tmp_path, Image.fromarray(grey).convert("RGB").convert("CMYK"), "tiff"),
        "16 bits": _bytes(tmp_path, Image.fromarray(grey.astype(np.uint16) * 257), "png"),
        "alpha on white": _bytes(tmp_path, clear, "png"),
    }
    for name, data in variants.items():
        found = decode_image(data, 16, 1).astype(int)
        assert np.abs(found - expected).max() <= 2, name


def _bytes(folder: Path, image: Image.Image, ending: str) -> bytes:
    path = folder / f"variant.{ending}"
    image.save(path)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "bomb" / "a.png", gradient(40, 40))
    with pytest.raises(SourceError, match="none of the 1 files"):
        prepare_images(str(tmp_path / "bomb"), 16)


def test_max_images_are_spread_over_the_classes(tmp_path: Path) -> None:
    for name in "abcd":
        for i in range(5):
            save(tmp_path / "many" / name / f"{i}.png", gradient(16, 16))
    some = prepare_images(str(tmp_path / "many"), 16, max_images=8)
    assert list(some.images_per_class().values()) == [2, 2, 2, 2]


@pytest.mark.parametrize("call", [check_source, lambda source: prepare_images(source, 16)])
def test_missing_and_empty_sources_are_named(call: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere.*does not exist.*dog-silhouettes"):
        call(str(tmp_path / "nowhere"))  # type: ignore[operator]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        call(str(tmp_path / "empty"))  # type: ignore[operator]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "b.csv").write_text("b")
    with pytest.raises(SourceError, match=r"none of the 2 files.*\.txt"):
        call(str(tmp_path / "texts"))  # type: ignore[operator]
    with pytest.raises(SourceError, match="is a file"):
        call(str(tmp_path / "texts" / "a.txt"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_size": 0}, "image_size is 0, expected 1 or more"),
        ({"image_size": 16.5}, r"image_size is 16\.5 \(float\), expected an int"),
        ({"channels": 2}, "channels is 2, expected one of 1, 3"),
        ({"crop": "centre"}, "crop is 'centre', expected one of 'center', 'squash', 'box'"),
        ({"max_images": -1}, "max_images is -1, expected 0 or more"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(
    wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(ParameterError, match=said):
        prepare_images("/nowhere", **{"image_size": 16, **wrong})  # type: ignore[arg-type]


def test_images_from_s3(folder: Path, s3: str) -> None:
    upload(folder, f"{s3}/dogs")
    there, here = prepare_images(f"{s3}/dogs", 16), prepare_images(str(folder), 16)
    assert there.classes == here.classes
    np.testing.assert_array_equal(there.pixels, here.pixels)


def test_s3_lists_the_same_through_obstore_and_s3fs(
    folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.txt").write_text("beside the class folders")
    place = f"{s3}/listed-{folder.parent.name}"
    upload(folder, place)
    quick = listing.list_files(find_source(place))
    assert set(quick.paths) == {"a.txt", "beagle/a.png", "beagle/b.jpg", "spaniel/ü 犬 🐕.png"}
    monkeypatch.setattr(listing, "_find_objects", lambda *_: None)
    assert listing.list_files(find_source(place)) == quick


def test_objects_that_mark_folders_are_no_files() -> None:
    store = MemoryStore()
    for path in ("dogs", "dogs/a", "dogs/a/b", "dogs/a/b/1.jpg", "dogs/c/2.jpg", "dogs/a/empty"):
        store.put(path, b"pixels" if path.endswith("jpg") else b"")
    found = {info["path"] for info in list_objects(store, "dogs")}
    assert found == {"dogs/a/b/1.jpg", "dogs/c/2.jpg", "dogs/a/empty"}


def test_what_s3_does_not_have(folder: Path, s3: str) -> None:
    for place in (f"{s3}/no-such-prefix", "s3://no-such-bucket/dogs"):
        for call in (check_source, lambda source: prepare_images(source, 16)):
            with pytest.raises(SourceError, match=r"does not exist|cannot be read"):
                call(place)


def test_where_no_s3_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    options = {"anon": True, "endpoint_url": f"http://127.0.0.1:{closed}"}
    with pytest.raises(SourceError, match=r"cannot be read.*check the address, the network"):
        prepare_images("s3://bucket/dogs", 16, storage_options=options)


def test_a_file_is_no_folder_of_images() -> None:
    fsspec.filesystem("memory").pipe_file("/a-file/dog.png", b"")
    with pytest.raises(SourceError, match="is a file, not a folder: name its folder"):
        prepare_images("memory://a-file/dog.png", 16)


def test_only_arrays_are_unpickled() -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run by a pickle",)

    with pytest.raises(pickle.UnpicklingError, match="not part of an array"):
        embedded._ArrayUnpickler(__import__("io").BytesIO(pickle.dumps(Attack()))).load()


def test_package_data_with_another_checksum_are_refused() -> None:
    part = manifest.sources()["dog-silhouettes"]["package"]["labels"]
    with pytest.raises(SourceError, match="SHA-256"):
        manifest.package_file("animal-shape-mnist", part["path"], "0" * 64)
    with pytest.raises(SourceError, match="pip install no-such-package"):
        manifest.package_file("no-such-package", part["path"], "0" * 64)


def test_manifest_counts_add_up() -> None:
    for entry in manifest.sources().values():
        assert sum(entry["classes"].values()) == entry["images"]
    dogs = manifest.sources()["stanford-dogs"]
    assert (dogs["images"], len(dogs["classes"])) == (20_580, 120)


def test_practice_photographs_have_their_dogs_in_the_boxes(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path, n=40)
    found = prepare_images(str(folder), 32, crop="box", cache=str(tmp_path / "cache"))
    assert found.images_per_class() == {"black": 10, "brown": 10, "golden": 10, "white": 10}
    assert len(found.skipped) == 4
    middle = np.asarray(found.pixels)[:, 12:20, 12:20].mean(axis=(1, 2, 3))
    by_coat = [middle[found.labels == label].mean() for label in range(4)]
    assert by_coat == sorted(by_coat)


def test_a_public_bucket_needs_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    # Nor are any to be found in a file, or asked of a machine in a cloud.
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = make_photographs(tmp_path / "bucket", n=8, dirt=False)
    with serve_s3(tmp_path, anonymous=True):
        check_source("s3://bucket/Images")
        there = prepare_images("s3://bucket/Images", 16, cache=str(tmp_path / "cache"))
    here = prepare_images(str(folder), 16, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(there.pixels, here.pixels)


def test_buckets_and_servers_are_not_taken_for_each_other(tmp_path: Path) -> None:
    for number, server in enumerate(("first", "second")):
        for bucket in ("one", "two"):
            place = tmp_path / server / bucket
            pixels = np.full((8, 8, 3), 50 * number + (100 if bucket == "two" else 0), np.uint8)
            save(place / "dogs" / "dog.bmp", pixels)
        with serve_s3(tmp_path / server):
            for bucket in ("one", "two"):
                cache = str(tmp_path / "caches" / server / bucket)
                there = prepare_images(f"s3://{bucket}", 16, cache=cache)
                here = prepare_images(str(tmp_path / server / bucket), 16, cache=cache)
                np.testing.assert_array_equal(there.pixels, here.pixels)
