"""Images -> one picture: a grid, as a PNG or in a GIF; and a PNG that somebody else has written."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 0) -> np.ndarray:
    """Lay images side by side.

    Args:
        images: N x H x W x C.
        columns: as many as make the grid square, if None.
        gap: white pixels between them.

    Returns:
        (rows * (H + gap) - gap) x (columns * (W + gap) - gap) x C; what is left over is black,
        or white where there are gaps.
    """
    n, height, width, c = images.shape
    columns = columns or max(1, round(np.sqrt(n)))
    rows = -(-n // columns)
    shape = rows * columns, height + gap, width + gap, c
    full = np.full(shape, 255 if gap else 0, dtype=images.dtype)
    full[:n, :height, :width] = images
    grid = full.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    whole = grid.reshape(rows * shape[1], columns * shape[2], c)
    return whole[: len(whole) - gap, : whole.shape[1] - gap]


def cut_apart(picture: np.ndarray, side: int) -> np.ndarray:
    """A grid of square images without gaps, H x W x C -> its images, N x side x side x C."""
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    parts = picture.reshape(rows, side, columns, side, -1).swapaxes(1, 2)
    return parts.reshape(rows * columns, side, side, -1)


def png_bytes(picture: np.ndarray) -> bytes:
    """A uint8 H x W x C array as a PNG file."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    # Pillow's own level, 6, takes up to three times as long for nearly the same size.
    image.save(buffer, "png", compress_level=4)
    return buffer.getvalue()


def read_png(data: bytes) -> np.ndarray:
    """What `png_bytes` wrote: uint8, H x W x 1 or H x W x 3.

    Raises:
        OSError, ValueError or SyntaxError, as Pillow: if it is no PNG. Anything else might be a
            program: Pillow has Ghostscript run EPS.
    """
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def gif_bytes(
    frames: np.ndarray | Sequence[np.ndarray], width: int, names: Sequence[str] = ()
) -> bytes:
    """A GIF that repeats for ever; each frame is uint8, H x W x C, with its name above it."""
    scale = max(1, width // frames[0].shape[1])
    strip, font = (22 if names else 0), ImageFont.load_default(14)
    pages = []
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame)
        size = (image.width * scale, image.height * scale)
        page = Image.new(image.mode, (size[0], size[1] + strip), "white")
        page.paste(image.resize(size, Image.Resampling.NEAREST), (0, strip))
        if names:
            ImageDraw.Draw(page).text((3, 2), names[i], fill="black", font=font)
        pages.append(page)
    # The last frame is the result: let it stand a while.
    times = [120] * (len(pages) - 1) + [1440]
    more, buffer = pages[1:], io.BytesIO()
    pages[0].save(buffer, "gif", save_all=True, append_images=more, duration=times, loop=0)
    return buffer.getvalue()
