"""How fast do images come: read anew from S3 in each epoch, prepared once, and from memory?

    python benchmarks/data_path.py [FOLDER] [--repeats 3]
    python benchmarks/data_path.py --many 200000

The first command serves the photographs in FOLDER (class folders; without it, 720
drawn ones) through an S3 server on this machine. In each round it measures, one
after the other: one pass of dask-pytorch-ddp's S3ImageFolder and one of a folder read
through fsspec, each in a DataLoader with two worker processes, in a process of its
own; a cold preparation on one and on two Dask workers; opening what is prepared; and
batches of it. A ratio is the median of those of the rounds, because a machine's speed
changes from minute to minute. The second command prepares so many small files, and a
quarter of them, and shows time and memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["GAN_LIB_HEADLESS"] = "1"

import fsspec
import numpy as np
import torch
from dask_pytorch_ddp.data import S3ImageFolder
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.data.batches import Batches
from gan_lib.data.decoding import FORMATS
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.photographs import make_photographs
from gan_lib.practice.s3_server import serve_s3

IMAGE_SIZE = 64
BATCH_SIZE = 64
BUCKET, PREFIX = "bucket", "Images"
URL = f"s3://{BUCKET}/{PREFIX}"
# Passes over the prepared images: one takes some milliseconds.
PASSES = 200
TRANSFORM = transforms.Compose(
    [
        transforms.Resize(IMAGE_SIZE),
        transforms.CenterCrop(IMAGE_SIZE),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]
)


class FsspecFolder(Dataset):
    """The images of an fsspec folder, each opened anew when it is asked for."""

    def __init__(self, url: str) -> None:
        fs, root = fsspec.core.url_to_fs(url)
        self.url = url
        self.paths = sorted(path for path in fs.find(root) if path.endswith(".jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        fs, _ = fsspec.core.url_to_fs(self.url)
        with fs.open(self.paths[index]) as file:
            return TRANSFORM(Image.open(file, formats=FORMATS).convert("RGB")), 0


ONE_PASS = {
    "S3ImageFolder": lambda: S3ImageFolder(BUCKET, f"{PREFIX}/", transform=TRANSFORM),
    "fsspec folder": lambda: FsspecFolder(URL),
}


def one_pass(name: str) -> float:
    """Images per second of one pass of a DataLoader with two worker processes."""
    dataset = ONE_PASS[name]()
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=2)
    started = time.perf_counter()
    n = sum(len(images) for images, _ in loader)
    return n / (time.perf_counter() - started)


def alone(name: str) -> float:
    """`one_pass` in a process of its own: a DataLoader forks, which does not go with a cluster."""
    command = [sys.executable, __file__, "--one-pass", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def preparation(n_workers: int, cache: str) -> float:
    """Images per second of a cold preparation: the median of three, of which the last stays."""
    client = start_cluster(n_workers, device="cpu")
    rates = []
    try:
        # The first task of a worker imports what all others use: that one does not count.
        for _ in range(4):
            shutil.rmtree(cache, ignore_errors=True)
            started = time.perf_counter()
            images = prepare_images(URL, IMAGE_SIZE, client=client, cache=cache, progress=False)
            rates.append(len(images) / (time.perf_counter() - started))
    finally:
        close_cluster(client)
    return statistics.median(rates[1:])


def batches(images: ImageSet) -> tuple[float, float]:
    """Images per second as training takes them: gathered (uint8), and normalised too (float32)."""
    order = np.random.default_rng(0).permutation(len(images))
    shares = np.array_split(order, -(-len(images) // BATCH_SIZE))
    started = time.perf_counter()
    n = sum(len(images.pixels[share]) for _ in range(PASSES) for share in shares)
    gathered = n / (time.perf_counter() - started)
    parameters = TrainingParameters(image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, flip=False)
    made = Batches(images, parameters)
    started = time.perf_counter()
    n = sum(batch.n_total for epoch in range(PASSES) for batch in made.epoch(epoch))
    return gathered, n / (time.perf_counter() - started)


def compare(photographs: Path, repeats: int) -> None:
    """Print each way's images/s, and its ratio to S3ImageFolder."""
    with tempfile.TemporaryDirectory() as store, serve_s3(store):
        # S3ImageFolder takes whatever lies under its prefix for an image.
        shutil.copytree(
            photographs,
            Path(store, BUCKET, PREFIX),
            ignore=lambda folder, names: [
                name for name in names if Path(folder, name).is_file() and name[-4:] != ".jpg"
            ],
        )
        cache = f"{store}/cache"
        rounds = []
        for _ in tqdm(range(repeats), "rounds"):
            rates = {f"{name}, DataLoader with 2 processes": alone(name) for name in ONE_PASS}
            rates["cold preparation, 1 Dask worker"] = preparation(1, cache)
            rates["cold preparation, 2 Dask workers"] = preparation(2, cache)
            started = time.perf_counter()
            images = prepare_images(URL, IMAGE_SIZE, cache=cache)
            again = time.perf_counter() - started
            gathered, normalised = batches(images)
            rates["batches of prepared images, uint8"] = gathered
            rates["batches of prepared images, normalised"] = normalised
            rounds.append(rates)
    print(f"{len(images)} photographs, {IMAGE_SIZE} x {IMAGE_SIZE}, median of {repeats} rounds")
    base = next(iter(rounds[0]))
    for name in rounds[0]:
        rate = statistics.median(rates[name] for rates in rounds)
        ratios = sorted(rates[name] / rates[base] for rates in rounds)
        print(
            f"  {name:44} {rate:12,.0f} images/s  {statistics.median(ratios):8,.1f} x "
            f"({ratios[0]:,.1f} to {ratios[-1]:,.1f})"
        )
    print(f"  the same call again opens them in {1000 * again:.0f} ms, listing the source included")


def many(n: int) -> None:
    """Prepare `n` small files, and a quarter of them: time per file, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(n):
            place = Path(folder, "Images", f"class_{i % 100:03d}")
            if i < 100:
                place.mkdir(parents=True)
            Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(
                place / f"{i:07d}.png", compress_level=0
            )
        for count in (n // 4, n):
            client = start_cluster(2, device="cpu")
            try:
                client.run(_import_what_preparing_needs)
                before = [_peak_memory(), *client.run(_peak_memory).values()]
                started = time.perf_counter()
                images = prepare_images(
                    f"{folder}/Images", 16, max_images=count, client=client, cache=f"{folder}/cache"
                )
                seconds = time.perf_counter() - started
                after = [_peak_memory(), *client.run(_peak_memory).values()]
            finally:
                close_cluster(client)
            grown = ", ".join(f"{b - a:.0f}" for a, b in zip(before, after, strict=True))
            print(
                f"{len(images):8,} files: {seconds:6.1f} s, {1e6 * seconds / count:4.0f} us each; "
                f"memory above the start, client and workers: {grown} MB"
            )


def _import_what_preparing_needs() -> None:
    pass


def _peak_memory() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="class folders of JPEG photographs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=0, metavar="N", help="prepare N small files")
    parser.add_argument("--one-pass", choices=ONE_PASS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one_pass:
        print(one_pass(options.one_pass))
        return
    if options.many:
        many(options.many)
        return
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.folder or make_photographs(drawn, 720, dirt=False)
        compare(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
