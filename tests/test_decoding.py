"""One file -> pixels: upright, opaque, of eight bits, and in no more memory than needed."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_dirt import encoded, png

from gan_lib.data import decoding
from gan_lib.data.decoding import decode_image, fit_image, read_boxes

RED, GREEN, BLUE, YELLOW = (220, 40, 30), (30, 200, 40), (20, 40, 220), (240, 240, 30)
# The colours of the corners as they lie in the file, in reading order, once it is turned.
TURNED = {
    1: (RED, GREEN, BLUE, YELLOW),
    2: (GREEN, RED, YELLOW, BLUE),
    3: (YELLOW, BLUE, GREEN, RED),
    4: (BLUE, YELLOW, RED, GREEN),
    5: (RED, BLUE, GREEN, YELLOW),
    6: (BLUE, RED, YELLOW, GREEN),
    7: (YELLOW, GREEN, BLUE, RED),
    8: (GREEN, YELLOW, RED, BLUE),
}


def four_colours() -> Image.Image:
    pixels = np.empty((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = TURNED[1]
    return Image.fromarray(pixels)


def tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def with_a_hole(image: Image.Image) -> Image.Image:
    """Its middle is transparent, and black."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (20, 12, 28, 20))
    return image


def clear_palette(image: Image.Image) -> Image.Image:
    """As a palette, of which one colour is transparent."""
    clear = with_a_hole(image).convert("RGB").quantize(8)
    clear.info["transparency"] = clear.getpixel((24, 16))
    return clear


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)


# form of the file, the image in it, and what is in its middle
FORMS = {
    "PNG": ("PNG", lambda image: image, None),
    "PNG with alpha": ("PNG", with_a_hole, 255),
    "PNG of grey with alpha": ("PNG", lambda image: with_a_hole(image).convert("LA"), 255),
    "PNG with a transparent palette": ("PNG", clear_palette, 255),
    "PNG of 16 bits": ("PNG", sixteen, None),
    "TIFF": ("TIFF", lambda image: image, None),
    "TIFF with alpha": ("TIFF", with_a_hole, 255),
    "TIFF of 16 bits": ("TIFF", sixteen, None),
    "TIFF of CMYK": ("TIFF", lambda image: image.convert("CMYK"), None),
    "WEBP": ("WEBP", lambda image: image, None),
    "WEBP with alpha": ("WEBP", with_a_hole, 255),
    "AVIF": ("AVIF", lambda image: image, None),
    "AVIF with alpha": ("AVIF", with_a_hole, 255),
    "JPEG": ("JPEG", lambda image: image, None),
    "JPEG of CMYK": ("JPEG", lambda image: image.convert("CMYK"), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_turned_by_its_tag_and_laid_on_white(name: str) -> None:
    form, changed, middle = FORMS[name]
    image = changed(four_colours())
    options = {"quality": 95} if form in ("WEBP", "AVIF", "JPEG") else {}
    for orientation, corners in TURNED.items():
        data = encoded(image, form, exif=tag(orientation), **options)
        with Image.open(io.BytesIO(data)) as opened:
            found = [decode_image(data, 16, 3), fit_image(opened, 16, 3)]
        for pixels in found:
            expected = Image.fromarray(np.array([corners], np.uint8))
            if "grey" in name or "16" in name:
                expected = expected.convert("L").convert("RGB")
            there = pixels[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
            assert np.abs(there - np.asarray(expected)[0]).max() <= 14, orientation
            if middle is not None:
                assert pixels[7:9, 7:9].min() >= middle - 8, orientation


def test_parts_of_an_image_are_converted_to_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = np.random.default_rng(0).integers(256, size=(90, 70, 4), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)]
    whole = [fit_image(image, 16, 3) for image in images]
    monkeypatch.setattr(decoding, "_BAND", 700)
    np.testing.assert_array_equal(whole, [fit_image(image, 16, 3) for image in images])


def grey(high: float, kind: Any) -> Image.Image:
    """From black on the left to `high` on the right."""
    return Image.fromarray(np.repeat(np.linspace(0, high, 32)[None], 32, axis=0).astype(kind))


@pytest.mark.parametrize(
    ("form", "image"),
    [
        ("PNG", grey(255, np.uint8)),
        ("PNG", grey(65535, np.uint16)),
        ("TIFF", grey(65535, np.uint16)),
        ("TIFF", grey(65535, ">u2")),
        ("TIFF", grey(65535, np.int32)),
        ("TIFF", grey(255, np.int32)),
        ("TIFF", grey(255, np.uint16)),
        ("TIFF", grey(1, np.float32)),
        ("TIFF", grey(255, np.float32)),
    ],
)
def test_values_of_any_size_are_brought_to_eight_bits(form: str, image: Image.Image) -> None:
    found = decode_image(encoded(image, form), 32, 1)[..., 0].astype(int)
    assert np.abs(found - np.linspace(0, 255, 32)).max() <= 1


@pytest.mark.parametrize(
    ("form", "image", "said"),
    [
        ("TIFF", grey(4095, np.uint16), r"go from 0 to 4095, neither 0 to 255 nor 0 to 65535"),
        ("PNG", grey(4095, np.uint16), r"go from 0 to 4095, neither"),
        ("TIFF", grey(-5, np.int32), r"go from -5 to 0, neither"),
        ("TIFF", grey(10**6, np.int32), r"go from 0 to 1e\+06, neither"),
        ("TIFF", grey(np.nan, np.float32), r"go from nan to nan, neither 0 to 255 nor 0 to 1:"),
        ("TIFF", grey(1000, np.float32), r"go from 0 to 1000, neither"),
    ],
)
def test_where_nothing_says_what_is_white(form: str, image: Image.Image, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_image(encoded(image, form), 16, 3)


@pytest.mark.parametrize(("kind", "rest"), [(2, b""), (6, b"\xff\xff"), (4, b"\xff\xff")])
def test_twelve_bits_in_the_sixteen_of_a_png_of_several_channels(kind: int, rest: bytes) -> None:
    # Colour, colour with alpha, grey with alpha.
    pixel = b"\x0f\xff" * (1 if kind == 4 else 3) + rest
    with pytest.raises(ValueError, match="all below 4096, neither 0 to 255 nor 0 to 65535"):
        decode_image(png(40, 30, 16, (b"\0" + pixel * 40) * 30, kind), 16, 3)


def test_a_transparent_value_of_sixteen_bits_is_white() -> None:
    data = encoded(Image.fromarray(np.full((20, 20), 20_000, np.uint16)), "PNG")
    assert decode_image(data, 16, 1).max() == 78
    with Image.open(io.BytesIO(data)) as image:
        image.info["transparency"] = 20_000
        assert fit_image(image, 16, 1).min() == 255


def test_a_damaged_tag_turns_nothing() -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(four_colours(), form, exif=b"Exif\0\0damaged")
        pixels = decode_image(data, 16, 3)
        assert np.abs(pixels[2, 2].astype(int) - RED).max() <= 12


INFINITE = float("inf")


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, INFINITE, INFINITE),
        (-INFINITE, 0, INFINITE, 20),
        (float("nan"), 0, 20, 20),
        (48, 0, 60, 20),
        (0, -20, 20, 0),
        (30, 0, 20, 20),
    ],
)
def test_a_box_that_shows_nothing_is_a_reason(box: tuple[float, float, float, float]) -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(four_colours(), form)
        with pytest.raises(ValueError, match=r"its box .* is none in an image of 48 x 32"):
            decode_image(data, 16, 3, "box", box)
        assert decode_image(data, 16, 3, "center", box).shape == (16, 16, 3)


def test_infinite_numbers_in_an_annotation_reach_no_picture(tmp_path: Path) -> None:
    annotation = (
        b"<a><bndbox><xmin>-inf</xmin><ymin>0</ymin><xmax>inf</xmax><ymax>9</ymax></bndbox></a>"
    )
    (box,) = read_boxes(annotation)
    with pytest.raises(ValueError, match="its box"):
        decode_image(encoded(four_colours(), "PNG"), 16, 3, "box", box)


def test_a_box_is_that_of_the_file_as_it_lies() -> None:
    around_blue = (0, 16, 16, 32)
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(four_colours(), form, exif=tag(6))
        middle = decode_image(data, 16, 3, "box", around_blue)[8, 8].astype(int)
        assert np.abs(middle - BLUE).max() <= 14
    # Pillow turns these by itself.
    with pytest.raises(ValueError, match="a TIFF that is turned by a tag has no box"):
        decode_image(encoded(four_colours(), "TIFF", exif=tag(6)), 16, 3, "box", around_blue)
    upright = encoded(four_colours(), "TIFF", exif=tag(1))
    assert np.abs(decode_image(upright, 16, 3, "box", around_blue)[8, 8] - BLUE).max() == 0


def test_an_icon_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(four_colours(), "ICO", sizes=[(32, 32)])
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match="an icon"):
        decode_image(data, 16, 3)


@pytest.mark.parametrize("form", ["transparent palette", "16 bits"])
def test_a_small_file_does_not_fill_the_memory(form: str, tmp_path: Path) -> None:
    # As many pixels as are decoded at all, in some kilobytes: one byte of each, or two.
    n = 9_459
    if form == "16 bits":
        image, held = Image.new("I;16", (n, n), 40_000), 2 * n * n
    else:
        image, held = Image.new("P", (n, n)), n * n
        image.info["transparency"] = 0
    image.save(tmp_path / "large.png")
    del image
    code = """
import resource, sys
from gan_lib.data.decoding import decode_image

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

data, before = open(sys.argv[1], "rb").read(), peak()
decode_image(data, 64, 3)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True
    )
    assert int(done.stdout) < held + 100 * 2**20, done.stderr


def test_images_are_decoded_together_only_as_far_as_their_pixels_fit() -> None:
    unit = decoding.PIXELS_PER_CORE
    room = decoding._Room(4 * unit)
    together, lock, most, n_done = 0, threading.Lock(), 0, 0

    def decode(pixels: int) -> None:
        nonlocal together, most, n_done
        for _ in range(200):
            with room.taken(pixels):
                # What is small counts for a core's share, what is larger than all for all.
                share = min(max(pixels, unit), 4 * unit)
                with lock:
                    together += share
                    most = max(most, together)
                with lock:
                    together -= share
        n_done += 1

    sizes = [1, unit, 2 * unit, 3 * unit, 4 * unit, 100 * unit, 1, 1]
    threads = [threading.Thread(target=decode, args=[size]) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 4 * unit
    assert n_done == len(sizes)
