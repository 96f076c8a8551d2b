"""Photographs to practise on: dogs of the embedded silhouettes in a landscape, with their boxes.

They are what a folder of photographs is, in kilobytes and without a network:
of many sizes, the dog not in the middle, some turned by their EXIF tag, and
between them files that are no images.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from gan_lib.data.images import prepare_images

# The class of a practice dog is the colour of its coat.
COATS = {
    "black": (38, 34, 36),
    "brown": (112, 72, 44),
    "golden": (205, 158, 90),
    "white": (236, 232, 224),
}
SKIES = ((120, 170, 225), (190, 205, 215), (235, 180, 140))
GROUNDS = ((86, 128, 62), (160, 140, 96), (205, 205, 210))
SIZES = ((500, 375), (375, 500), (500, 333), (400, 400), (640, 480))
# EXIF's tag 274: "turn by 90 degrees when shown".
ORIENTATION, TURNED = 274, 6

_ANNOTATION = """<annotation>
  <filename>{name}</filename>
  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
  <object><name>{coat}</name>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
  </object>
</annotation>
"""


def make_photographs(
    folder: str | os.PathLike[str], n: int = 120, seed: int = 0, dirt: bool = True
) -> Path:
    """Write photographs into class folders, with an annotation for each.

    Args:
        folder: gets `Images` and, beside it, `Annotation`, laid out like Stanford Dogs.
        n: photographs, about equally many of each coat.
        seed: the same seed draws the same photographs.
        dirt: put files between them that are no images.

    Returns:
        The path of `Images`.
    """
    silhouettes = np.asarray(prepare_images("dog-silhouettes", 32, channels=1).pixels)[..., 0]
    rng = np.random.default_rng(seed)
    images, annotations = Path(folder, "Images"), Path(folder, "Annotation")
    for i in range(n):
        coat = list(COATS)[i % len(COATS)]
        photograph, box = _photograph(silhouettes[rng.integers(len(silhouettes))], coat, rng)
        name = f"{coat}_{i:04d}"
        for place in (images / coat, annotations / coat):
            place.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        size = photograph.size
        if i % 10 == 9:
            # Held on its side, and turned back by whoever shows it.
            photograph = photograph.transpose(Image.Transpose.ROTATE_90)
            exif[ORIENTATION] = TURNED
            # Boxes are those of the file, as it lies on the disk.
            box = (box[1], size[0] - box[2], box[3], size[0] - box[0])
        photograph.save(images / coat / f"{name}.jpg", quality=88, exif=exif)
        width, height = photograph.size
        text = _ANNOTATION.format(*box, name=name, coat=coat, width=width, height=height)
        (annotations / coat / name).write_text(text)
    if dirt:
        _add_dirt(images)
    return images


def _photograph(
    silhouette: np.ndarray, coat: str, rng: np.random.Generator
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A dog in a landscape, and the box around it: left, upper, right, lower."""
    width, height = SIZES[rng.integers(len(SIZES))]
    horizon = int(height * rng.uniform(0.35, 0.65))
    picture = np.empty((height, width, 3), np.float32)
    picture[:horizon] = SKIES[rng.integers(len(SKIES))]
    picture[:horizon] += np.linspace(25, -10, horizon)[:, None, None]
    picture[horizon:] = GROUNDS[rng.integers(len(GROUNDS))]
    picture[horizon:] += _texture(rng, height - horizon, width, 40)
    # Bright is dog in the silhouettes.
    dog = silhouette.astype(np.float32) / 255
    rows, columns = np.flatnonzero(dog.max(axis=1) > 0.5), np.flatnonzero(dog.max(axis=0) > 0.5)
    dog = dog[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = rng.uniform(0.35, 0.7) * min(height / dog.shape[0], width / dog.shape[1])
    size = (round(dog.shape[1] * scale), round(dog.shape[0] * scale))
    large = Image.fromarray((dog * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    # Enlarged ten times a silhouette is soft: its edge is where it is half bright.
    soft = np.asarray(large.filter(ImageFilter.GaussianBlur(2)), np.float32)
    mask = np.clip((soft - 127) / 30 + 0.5, 0, 1)[..., None]
    x = int(rng.integers(width - size[0] + 1))
    y = int(rng.integers(max(0, horizon - size[1]), height - size[1] + 1))
    fur = np.array(COATS[coat], np.float32) + _texture(rng, size[1], size[0], 25)
    part = picture[y : y + size[1], x : x + size[0]]
    part[:] = part * (1 - mask) + fur * mask
    picture += rng.normal(0, 4, picture.shape).astype(np.float32)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return image, (x, y, x + size[0], y + size[1])


def _texture(rng: np.random.Generator, height: int, width: int, strength: float) -> np.ndarray:
    """Blurred noise of one grey channel: height x width x 1."""
    noise = rng.integers(256, size=(-(-height // 6), -(-width // 6)), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(smooth, np.float32)[..., None] / 255 - 0.5) * strength


def _add_dirt(images: Path) -> None:
    """What lies between the photographs of nearly every real folder."""
    (images / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (images / "black" / "notes.jpg").write_text("call the breeder on Monday")
    (images / "white" / "empty.jpg").touch()
    whole = next((images / "golden").glob("*.jpg")).read_bytes()
    (images / "golden" / "cut_short.jpg").write_bytes(whole[: len(whole) // 3])
