"""One image file -> pixels: upright, opaque, cut to a square and shrunk."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# What photographs come as. Pillow reads more, among them EPS, by running Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
# How the files of telephones begin that Pillow does not read.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
# A JPEG is decoded at no less than so many times the wanted size.
LEAST_REDUCTION = 1.25
# left, upper, right, lower, in pixels of the file
Box = tuple[float, float, float, float]


def decode_image(
    data: bytes, image_size: int, channels: int, crop: str = "center", box: Box | None = None
) -> np.ndarray:
    """Decode one image file: uint8, image_size x image_size x channels.

    Turns it upright by its EXIF tag, puts transparent pixels on white, and takes
    the first frame of an animation.

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
    reduced = _decode_jpeg(data, image_size, crop, box)
    if reduced is not None:
        return _shrink(*reduced, image_size, channels)
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        raise ValueError("a HEIC photograph, which is not read: convert it to JPEG")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        region = _region(width, height, crop, box)
        reduction = _reduction(region, image_size)
        image.draft("RGB", (width // reduction, height // reduction))
        if _too_many(image.width * image.height):
            raise ValueError(f"{width} x {height} pixels are too many to decode safely")
        image.load()
        return _shrink(image, _scaled(region, width, height, image), image_size, channels)


def _decode_jpeg(
    data: bytes, image_size: int, crop: str, box: Box | None
) -> tuple[Image.Image, Box] | None:
    """The pixels of a common JPEG and the region of them that is kept; None for any other file.

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
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // reduction), min_width=-(-width // reduction)
        )
    # Whatever is wrong with it, Pillow repairs it or says it in its words.
    except ValueError:
        return None
    image = Image.fromarray(pixels)
    if _may_be_turned(data):
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            image.info = opened.info
    return image, _scaled(region, width, height, image)


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


def fit_image(
    image: Image.Image, image_size: int, channels: int, crop: str = "center"
) -> np.ndarray:
    """An opened image as `decode_image` makes it: uint8, image_size x image_size x channels."""
    return _shrink(image, _region(*image.size, crop, None), image_size, channels)


def _shrink(image: Image.Image, region: Box, image_size: int, channels: int) -> np.ndarray:
    whole = _without_alpha(_to_eight_bits(image))
    mode = "L" if channels == 1 else "RGB"
    whole = whole if whole.mode == mode else whole.convert(mode)  # which would copy it
    # The filter that torchvision's Resize takes, too.
    small = whole.resize((image_size, image_size), Image.Resampling.BILINEAR, box=region)
    # A square is as well turned after it has been made small.
    upright = ImageOps.exif_transpose(small)
    return np.asarray(upright).reshape(image_size, image_size, channels)


def _region(width: int, height: int, crop: str, box: Box | None) -> Box:
    """The part of an image that is kept."""
    if crop == "squash":
        return (0, 0, width, height)
    left, upper, right, lower = box if crop == "box" and box is not None else (0, 0, width, height)
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
        boxes = [
            tuple(float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            for box in root.iter("bndbox")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"its annotation cannot be read: {error}") from None
    boxes = [(a, b, c, d) for a, b, c, d in boxes if c > a and d > b]
    if not boxes:
        raise ValueError("its annotation holds no box")
    return boxes


def _to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16-bit grey clips at 255 and leaves a white square.
    if image.mode.startswith("I;16") or image.mode == "I":
        eight = (np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(eight)
    if image.mode == "F":
        # Floating-point files hold 0 to 1 or 0 to 255, and nothing in them says which.
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255):
            raise ValueError(f"its values go from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255")
        return Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8))
    return image


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image
