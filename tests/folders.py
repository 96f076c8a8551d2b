"""Folders of images that a test makes for itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def add_greys(folder: Path, numbers: Iterable[int]) -> None:
    """Put images of 16 pixels there, made if need be: each of another grey, 000.png and so on."""
    folder.mkdir(exist_ok=True)
    for n in numbers:
        Image.new("L", (16, 16), n % 256).save(folder / f"{n:03d}.png")
