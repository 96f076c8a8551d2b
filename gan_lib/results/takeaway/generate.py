"""Draws new images with torch alone: `python generate.py 0 1 2` writes seed_0000.png and so on."""

import argparse
import json
import random
import struct
import zlib
from pathlib import Path

import torch
from torch.nn.functional import batch_norm, conv_transpose2d

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
# A safetensors file: the length of a table of contents, the table, and the numbers.
DATA = bytearray((HERE / "model.safetensors").read_bytes())
START = 8 + int.from_bytes(DATA[:8], "little")
WEIGHTS = {
    name: torch.frombuffer(DATA[START:][slice(*told["data_offsets"])], dtype=torch.float32)
    .reshape(told["shape"])
    .double()
    for name, told in json.loads(DATA[8:START]).items()
}  # fmt: skip


@torch.no_grad()
def generate(seed: int, of: str = "") -> torch.Tensor:
    """The image of a seed: uint8, H x W x C. `of` is a class, if there are any in config.json."""
    rng = random.Random(seed)
    x = torch.tensor([rng.gauss(0, 1) for _ in range(CONFIG["nz"])]).reshape(1, -1, 1, 1).double()
    names, counts = list(CONFIG["classes"]), list(CONFIG["classes"].values())
    label = names.index(of or rng.choices(names, counts)[0]) if names else None
    for layer in CONFIG["layers"]:
        name = layer.get("name")
        if layer["kind"] == "convolution":
            weight = WEIGHTS[f"{name}.weight"]
            x = conv_transpose2d(x, weight, None, layer["stride"], layer["padding"])
        elif layer["kind"] == "norm":
            norm = name if label is None else f"{name}.norm"
            means, variances = WEIGHTS[f"{norm}.running_mean"], WEIGHTS[f"{norm}.running_var"]
            factors, offsets = WEIGHTS[f"{norm}.weight"], WEIGHTS[f"{norm}.bias"]
            x = batch_norm(x, means, variances, factors, offsets, eps=layer["eps"])
            if label is not None:
                own = WEIGHTS[f"{name}.own.weight"][label].reshape(1, -1, 1, 1)
                factor, offset = own.chunk(2, dim=1)
                x = x * (1 + factor) + offset
        elif layer["kind"] == "keep":
            kept = x
        elif layer["kind"] == "add":
            x = x + kept
        else:
            x = x.relu() if layer["kind"] == "relu" else x.tanh()
    mean, std = CONFIG["pixel_mean"], CONFIG["pixel_std"]
    pixels = x.float().add(mean / std).mul(255 * std).round().clamp(0, 255).to(torch.uint8)
    return pixels[0].permute(1, 2, 0)


def png(pixels: torch.Tensor) -> bytes:
    """An image as a PNG file."""

    def part(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width, channels = pixels.shape
    head = struct.pack(">2I5B", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in pixels)
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
