"""One folder with everything that real folders have, and what becomes of each file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from uploading import upload

from gan_lib.base.errors import ParameterError, SourceError
from gan_lib.data.decoding import decode_image
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import SkippedFilesWarning, prepare_images

RED, GREY = (220, 40, 30), 128
SIZE = 16


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def png(width: int, height: int, bits: int, data: bytes, kind: int = 2) -> bytes:
    """A PNG of that size and kind (2 is RGB), whatever its data are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    image = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + image + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A PNG that says of itself that it has 50,000 x 50,000 pixels."""
    return png(50_000, 50_000, 8, b"\0" * 1000)


def sixteen_bits() -> bytes:
    """Red, with two bytes for each of its values."""
    row = b"\0" + struct.pack(">HHH", *(257 * value for value in RED)) * 40
    return png(40, 30, 16, row * 30)


def transparent() -> Image.Image:
    """Red on the left, and nothing on the right."""
    image = Image.new("RGBA", (40, 40), (*RED, 255))
    image.paste((0, 0, 0, 0), (20, 0, 40, 40))
    return image


def turned(orientation: int) -> bytes:
    """Red above and blue below, once it is turned as its EXIF tag says."""
    image = Image.new("RGB", (40, 40), RED)
    image.paste((20, 40, 220), (0, 20, 40, 40))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for step in undo.get(orientation, []):
        image = image.transpose(step)
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95)


JPEG = encoded(red(), "JPEG", quality=95)
GREY_16 = Image.fromarray(np.full((30, 40), GREY * 257, np.uint16))
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "blue")]}

ALL_RED = {
    "plain.jpg": JPEG,
    "UPPER.JPG": JPEG,
    "no_ending": JPEG,
    "a png.jpg": encoded(red(), "PNG"),
    "garbage behind.jpg": JPEG + b"\0garbage" * 100,
    "palette.png": encoded(red("P"), "PNG"),
    "opaque alpha.png": encoded(red("RGBA"), "PNG"),
    "cmyk.jpg": encoded(red("CMYK"), "JPEG", quality=95),
    "progressive.jpg": encoded(red(), "JPEG", quality=95, progressive=True),
    "fill bytes.jpg": JPEG[:2] + b"\xff\xff\xff" + JPEG[2:],
    "sixteen bits.png": sixteen_bits(),
    "animated.gif": encoded(red(), "GIF", **ANIMATION),
    "animated.webp": encoded(red(), "WEBP", lossless=True, **ANIMATION),
    "still.webp": encoded(red(), "WEBP", quality=95),
    "photo.bmp": encoded(red(), "BMP"),
    "photo.tiff": encoded(red(), "TIFF"),
    "one pixel.png": encoded(red(size=(1, 1)), "PNG"),
    "a line.png": encoded(red(size=(1, 900)), "PNG"),
    "naïve café.jpg": JPEG,
    "nai\u0308ve.jpg": JPEG,
    "🐕 dog.jpg": JPEG,
    "50%20off #1 ?a=b&c+d [x] *.jpg": JPEG,
    "-rf.jpg": JPEG,
}
UNUSABLE = {
    "cut short.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"call the breeder on Monday", "not an image"),
    "page.jpg": (b"<!doctype html><html>404</html>", "not an image"),
    ".DS_Store": (b"\0\0\0\1Bud1", "not an image"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0" * 100, "not an image"),
    "._plain.jpg": (b"\0\5\x16\7" + b"\0" * 100, "not an image"),
    "notes.xml": (b"<annotation/>", "not an image"),
    # Pillow would have Ghostscript run it.
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "telephone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "heic photograph"),
    "more.zip": (b"PK\3\4" + b"\0" * 50, "not an image"),
    "bomb.png": (bomb(), "pixels"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders "red" and "other", and one with a single image."""
    root = tmp_path / "dirty"
    for name, data in {**ALL_RED, **{name: data for name, (data, _) in UNUSABLE.items()}}.items():
        path = root / "red" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "other").mkdir()
    for orientation in range(1, 9):
        (root / "other" / f"turned_{orientation}.jpg").write_bytes(turned(orientation))
    (root / "other" / "alpha.png").write_bytes(encoded(transparent(), "PNG"))
    (root / "other" / "grey16.png").write_bytes(encoded(GREY_16, "PNG"))
    (root / "single.1").mkdir()
    (root / "single.1" / "plain.jpg").write_bytes(JPEG)
    return root


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_floating_point_files(scale: float) -> None:
    values = np.linspace(0, scale, 900, dtype=np.float32).reshape(30, 30)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), SIZE, 1)
    assert pixels.min() < 20
    assert pixels.max() > 235


def test_floating_point_files_of_another_range() -> None:
    values = np.full((30, 30), -4.5, np.float32)
    with pytest.raises(ValueError, match=r"from -4\.5 to -4\.5, neither"):
        decode_image(encoded(Image.fromarray(values), "TIFF"), SIZE, 3)


def check(images: ImageSet) -> None:
    assert images.images_per_class() == {"other": 10, "red": len(ALL_RED), "single.1": 1}
    pixels = np.asarray(images.pixels).astype(int)
    for image in pixels[images.labels != 0]:
        assert np.abs(image - RED).max() <= 12
    # By name: alpha, grey16, turned_1 to turned_8.
    alpha, grey, *upright = pixels[images.labels == 0]
    assert np.abs(alpha[:, :6] - RED).max() <= 12
    assert alpha[:, 10:].min() >= 250
    assert np.abs(grey - GREY).max() <= 1
    for image in upright:
        assert np.abs(image[:6] - RED).max() <= 12
        assert np.abs(image[10:] - (20, 40, 220)).max() <= 12


def reasons(images: ImageSet) -> dict[str, str]:
    return {os.path.basename(url): why for url, why in images.skipped}


def test_each_file_of_a_dirty_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "empty class").mkdir()
    (folder / "red" / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "red" / "circle").symlink_to(folder)
    os.mkfifo(folder / "red" / "pipe.jpg")
    with pytest.warns(SkippedFilesWarning, match=f"of {len(ALL_RED) + 27} files skipped"):
        images = prepare_images(str(folder), SIZE, cache=str(tmp_path / "cache"))
    check(images)
    found = reasons(images)
    for name, (_, why) in UNUSABLE.items():
        assert why in found.pop(name).lower(), name
    assert set(found) == {"empty class", "nowhere.jpg", "circle", "pipe.jpg"}
    # Nothing of it becomes a class of its own, and the second call says the same.
    with pytest.warns(SkippedFilesWarning):
        again = prepare_images(str(folder), SIZE, cache=str(tmp_path / "cache"))
    assert again.skipped == images.skipped


def test_the_same_folder_on_s3(folder: Path, s3: str, tmp_path: Path) -> None:
    place = f"{s3}/{tmp_path.name}"
    store = fsspec.filesystem("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{place}/{path.relative_to(folder)}", path.read_bytes())
    with pytest.warns(SkippedFilesWarning):
        images = prepare_images(place, SIZE, cache=str(tmp_path / "cache"))
    check(images)
    found = reasons(images)
    assert set(found) == set(UNUSABLE)
    for name, (_, why) in UNUSABLE.items():
        assert why in found[name].lower(), name


HIDDEN = (".git", "red/.ipynb_checkpoints", "__MACOSX", "red/@eaDir")


def test_hidden_folders_are_no_classes(tmp_path: Path, s3: str) -> None:
    root = tmp_path / "dogs"
    for folder in (*HIDDEN, "red"):
        (root / folder / "deeper").mkdir(parents=True)
        (root / folder / "deeper" / "a.jpg").write_bytes(JPEG)
    place = f"{s3}/{tmp_path.name}"
    upload(root, place)
    for source in (str(root), place):
        with pytest.warns(SkippedFilesWarning, match="4 x a hidden folder"):
            images = prepare_images(source, SIZE, cache=str(tmp_path / "cache"))
        assert images.images_per_class() == {"deeper": 1}
        assert {url.split(f"{source}/")[-1] for url, _ in images.skipped} == set(HIDDEN)
    # A folder that lies in a hidden one is no worse for it.
    assert len(prepare_images(str(root / ".git"), SIZE, cache=str(tmp_path / "cache"))) == 1


def test_where_nothing_is_left_it_says_what_there_was(folder: Path, tmp_path: Path) -> None:
    for name in ALL_RED:
        (folder / "red" / name).unlink()
    with pytest.raises(SourceError, match="not an image"):
        prepare_images(str(folder / "red"), SIZE, cache=str(tmp_path / "cache"))


def test_silhouettes_have_no_boxes() -> None:
    with pytest.raises(ParameterError, match=r"crop is 'box'.*'dog-silhouettes' has no boxes"):
        prepare_images("dog-silhouettes", SIZE, channels=1, crop="box")
