"""Images -> one picture: a grid, as a PNG or in a GIF; and a PNG that somebody else has written."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay images side by side.

    Args:
        images: N x H x W x C.
        columns: as many as make the grid square, if None.

    Returns:
        (rows * H) x (columns * W) x C; what is left over is black.
    """
    n, height, width, c = images.shape
    columns = columns or max(1, round(np.sqrt(n)))
    rows = -(-n // columns)
    full = np.zeros((rows * columns, height, width, c), dtype=images.dtype)
    full[:n] = images
    grid = full.reshape(rows, columns, height, width, c).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, c)


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


def gif_bytes(frames: np.ndarray | Sequence[np.ndarray], width: int) -> bytes:
    """A GIF that repeats for ever; each frame is uint8, H x W x C."""
    scale = max(1, width // frames[0].shape[1])
    pages = []
    for frame in frames:
        page = Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame)
        size = (page.width * scale, page.height * scale)
        pages.append(page.resize(size, Image.Resampling.NEAREST))
    # The last frame is the result: let it stand a while.
    times = [120] * (len(pages) - 1) + [1440]
    more, buffer = pages[1:], io.BytesIO()
    pages[0].save(buffer, "gif", save_all=True, append_images=more, duration=times, loop=0)
    return buffer.getvalue()
