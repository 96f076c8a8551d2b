"""Draws new images with onnxruntime and numpy: `python generate_onnx.py 0 1 2` writes PNG files."""

import argparse
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
NETWORK = onnxruntime.InferenceSession(HERE / "generator.onnx")


def generate(seed: int, of: str = "") -> np.ndarray:
    """The image of a seed: uint8, H x W x C. `of` is a class, if there are any in config.json."""
    rng = random.Random(seed)
    z = np.array([[rng.gauss(0, 1) for _ in range(CONFIG["nz"])]], np.float32)
    told = {"z": z}
    names, counts = list(CONFIG["classes"]), list(CONFIG["classes"].values())
    if names:
        told["label"] = np.array([names.index(of or rng.choices(names, counts)[0])])
    (images,) = NETWORK.run(["image"], told)
    mean, std = CONFIG["pixel_mean"], CONFIG["pixel_std"]
    pixels = ((images[0] + mean / std) * (255 * std)).round().clip(0, 255)
    image: np.ndarray = pixels.transpose(1, 2, 0).astype(np.uint8)
    return image


def png(pixels: np.ndarray) -> bytes:
    """An image as a PNG file."""

    def part(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width, channels = pixels.shape
    head = struct.pack(">2I5B", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    parts = part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int, help="the same image for each, every time")
    if CONFIG["classes"]:
        parser.add_argument("--of", choices=list(CONFIG["classes"]), default="", metavar="CLASS")
    parser.add_argument("--out", type=Path, default=Path(), help="folder; default: this one")
    told = vars(parser.parse_args())
    for seed in told["seeds"]:
        image = generate(seed, told.get("of", ""))
        (told["out"] / f"seed_{seed:04d}.png").write_bytes(png(image))
