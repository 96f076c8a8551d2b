"""One image file -> pixels: upright, opaque, cut to a square and shrunk."""

from __future__ import annotations

import contextlib
import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from threading import Condition

import numpy as np
import simplejpeg
from dask.system import CPU_COUNT
from PIL import Image, ImageOps

# What photographs come as. Pillow reads more, among them EPS, by running Ghostscript on it, and
# ICO, by decoding it before its size is known.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
# How the files of telephones begin that Pillow does not read.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
# A JPEG is decoded at no less than so many times the wanted size.
LEAST_REDUCTION = 1.25
# Images are decoded at the same time, in this process, as long as they have no more pixels
# together than so many for each core; more than there are cores would take no less time. Decoded
# to RGB these are 128 MB, and some decoders hold a picture several times.
PIXELS_PER_CORE = 2**25
_TIMES_HELD = {"WEBP": 4, "AVIF": 2, "JPEG2000": 5}
# What must be converted before it is shrunk is converted so many pixels at a time.
_BAND = 2**22
# left, upper, right, lower, in pixels of the file
Box = tuple[float, float, float, float]


def decode_image(
    data: bytes, image_size: int, channels: int, crop: str = "center", box: Box | None = None
) -> np.ndarray:
    """Decode one image file: uint8, image_size x image_size x channels.

    Turns it upright by its EXIF tag, puts transparent pixels on white, and takes
    the first frame of an animation. Colour profiles are not applied.

    Args:
        data: the file.
        image_size: pixels per side of the result.
        channels: 1 for grey, 3 for RGB.
        crop: "center" cuts the largest square out of the middle; "squash" keeps
            everything and loses the proportions; "box" cuts a square around `box`.
        box: what "box" is to show: left, upper, right, lower, in pixels of the file.

    Raises:
        ValueError or OSError: with the reason, if the bytes are not a whole image.
    """
    if not data:
        raise ValueError("the file is empty")
    pixels = _decode_jpeg(data, image_size, channels, crop, box)
    if pixels is not None:
        return pixels
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        raise ValueError("a HEIC photograph, which is not read: convert it to JPEG")
    if data[:4] == b"\0\0\1\0":
        raise ValueError("an icon (ICO), which is not read: convert it to PNG")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        region = _region(width, height, crop, box)
        reduction = _reduction(region, image_size)
        image.draft("RGB", (width // reduction, height // reduction))
        if _too_many(image.width * image.height):
            raise ValueError(f"{width} x {height} pixels are too many to decode safely")
        # Pillow turns a TIFF as it loads it, and a box would not be turned with it.
        if image.format == "TIFF" and crop == "box" and image.getexif().get(0x0112, 1) != 1:
            raise ValueError("a TIFF that is turned by a tag has no box: save it upright")
        with _ROOM.taken(width * height * _TIMES_HELD.get(image.format or "", 1)):
            _load(image)
            return _shrink(image, _scaled(region, width, height, image), image_size, channels)


def _decode_jpeg(
    data: bytes, image_size: int, channels: int, crop: str, box: Box | None
) -> np.ndarray | None:
    """What `decode_image` makes of a common JPEG; None for any other file.

    simplejpeg and Pillow call the same libjpeg-turbo and give the same pixels, but
    Pillow's way there takes a third more time.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or _too_many(width * height):
            return None
        region = _region(width, height, crop, box)
        reduction = _reduction(region, image_size)
        with _ROOM.taken(width * height):
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=-(-height // reduction), min_width=-(-width // reduction)
            )
            image = Image.fromarray(pixels)
            if _may_be_turned(data):
                with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                    image.info = opened.info
            return _shrink(image, _scaled(region, width, height, image), image_size, channels)
    # Whatever is wrong with it, Pillow repairs it or says it in its words.
    except ValueError:
        return None


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP: a segment APP1 (E1) before the first scan (DA)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xE1, 0xDA):
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return data[at : at + 2] != b"\xff\xda"


def _too_many(pixels: int) -> bool:
    """Whether an image is so large that it may be made to fill the memory."""
    return pixels > (Image.MAX_IMAGE_PIXELS or 2**63)


def _reduction(region: Box, image_size: int) -> int:
    """How far a JPEG may be reduced as it is decoded: by 1, 2, 4 or 8, at a fraction of the time.

    What is left for the antialiased resize is at least a quarter more than the wanted
    size: on photographs at 64 pixels that is 39 dB (PSNR) from the resize of the whole
    image.
    """
    side = min(region[2] - region[0], region[3] - region[1])
    return next((by for by in (8, 4, 2) if side >= by * LEAST_REDUCTION * image_size), 1)


def _scaled(region: Box, width: int, height: int, image: Image.Image) -> Box:
    """A region of a file of width x height, in the pixels that it was decoded to."""
    x, y = image.width / width, image.height / height
    return (region[0] * x, region[1] * y, region[2] * x, region[3] * y)


class _Room:
    """Lets images be decoded at the same time, as long as their pixels fit."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._changed = Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Waits for room. An image that is larger than all of it has it for itself."""
        pixels = min(max(pixels, PIXELS_PER_CORE), self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(CPU_COUNT * PIXELS_PER_CORE)


def fit_image(
    image: Image.Image, image_size: int, channels: int, crop: str = "center"
) -> np.ndarray:
    """An opened image as `decode_image` makes it: uint8, image_size x image_size x channels.

    Raises:
        ValueError or OSError: with the reason, if it cannot be done.
    """
    _load(image)
    return _shrink(image, _region(*image.size, crop, None), image_size, channels)


def _load(image: Image.Image) -> None:
    """Decode it; some formats tell only then how they lie.

    Raises:
        ValueError: if Pillow, which keeps the upper eight of sixteen bits, has kept next to none.
    """
    is_cut = ";16" in str(getattr(image, "tile", "")) and image.mode[0] != "I"
    image.load()
    if is_cut:
        colours = np.reshape(image.getextrema(), (-1, 2))[: 1 if image.mode[0] == "L" else 3]
        if (high := colours.max()) < 2**6:
            raise ValueError(_unclear(f"are all below {256 * (high + 1)}", 65535))


def _shrink(image: Image.Image, region: Box, image_size: int, channels: int) -> np.ndarray:
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        small = _resize(image, (image_size, image_size), region)
    else:
        small = _shrink_in_bands(image, region, image_size)
    if small.mode == "RGBa":
        white = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(white, small.convert("RGBA"))
    small = small.convert("L" if channels == 1 else "RGB")
    # A square is as well turned after it has been made small.
    small.info = image.info
    # Pillow raises nearly anything on a damaged tag, and what is not known turns nothing.
    with contextlib.suppress(Exception):
        small = ImageOps.exif_transpose(small)
    return np.asarray(small).reshape(image_size, image_size, channels)


def _shrink_in_bands(image: Image.Image, region: Box, image_size: int) -> Image.Image:
    """As `_resize` to a square, of what has to be converted to L, RGB or RGBa before.

    The resize goes over the rows and then over the columns, as Pillow's own does; so the
    rows can be converted some at a time, and never take more memory than the image has.
    """
    converted = _conversion(image)
    left, upper, right, lower = region
    thin: Image.Image | None = None
    for top, band in _bands(image):
        part = converted(band)
        part = _resize(part, (image_size, part.height), (left, 0, right, part.height))
        thin = thin or Image.new(part.mode, (image_size, image.height))
        thin.paste(part, (0, top))
    assert thin is not None
    return _resize(thin, (image_size, image_size), (0, upper, image_size, lower))


def _region(width: int, height: int, crop: str, box: Box | None) -> Box:
    """The part of an image that is kept."""
    if crop == "squash":
        return (0, 0, width, height)
    left, upper, right, lower = box if crop == "box" and box is not None else (0, 0, width, height)
    across, down = min(right, width) - max(left, 0), min(lower, height) - max(upper, 0)
    if not (across > 0 and down > 0 and all(map(math.isfinite, (left, upper, right, lower)))):
        raise ValueError(f"its box {box} is none in an image of {width} x {height}")
    # A square that shows all of the box, as far as the image reaches.
    side = min(max(right - left, lower - upper), width, height)
    x = min(max((left + right - side) / 2, 0), width - side)
    y = min(max((upper + lower - side) / 2, 0), height - side)
    return (x, y, x + side, y + side)


def read_boxes(annotation: bytes) -> list[Box]:
    """The boxes of a PASCAL VOC annotation, in the order of the file.

    Raises:
        ValueError: if it is not one, or has no box.
    """
    try:
        root = ElementTree.fromstring(annotation)
        found = [
            tuple(float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            for box in root.iter("bndbox")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"its annotation cannot be read: {error}") from None
    boxes = [(a, b, c, d) for a, b, c, d in found if c > a and d > b]
    if not boxes:
        raise ValueError("its annotation holds no box")
    return boxes


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The rows of an image, some at a time: pairs of the first row and an image of them."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What brings a part of an image to eight bits: L or RGB, or RGBa where it is transparent.

    Raises:
        ValueError: if its values do not say which of them is white.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        if image.has_transparency_data:
            return lambda part: part.convert("RGBA").convert("RGBa")
        return lambda part: part.convert("RGB")
    values = (np.asarray(band) for _, band in _bands(image))
    # NumPy's, because Pillow's take no notice of values that are no numbers.
    ranges = [(some.min(), some.max()) for some in values]
    low, high = np.min(ranges), np.max(ranges)
    largest = 1 if image.mode == "F" else 65535
    if low >= 0 and high <= 255:
        white = 1 if image.mode == "F" and high <= 1 else 255
    elif low >= 0 and 2**14 <= high <= largest:
        white = largest
    else:
        raise ValueError(_unclear(f"go from {low:g} to {high:g}", largest))
    clear = image.info.get("transparency", -1)

    def to_eight_bits(part: Image.Image) -> Image.Image:
        some = np.asarray(part)
        some = np.where(some == clear, white, some)
        return Image.fromarray((some * np.float32(255 / white)).round().astype(np.uint8))

    return to_eight_bits


def _unclear(values: str, largest: int) -> str:
    return f"its values {values}, neither 0 to 255 nor 0 to {largest}: save it with 8 bits"


def _resize(image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
    # The filter that torchvision's Resize takes, too.
    return image.resize(size, Image.Resampling.BILINEAR, box=box)
