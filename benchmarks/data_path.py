"""How fast do images come: read anew from S3 in each epoch, prepared once, and from memory?

    python benchmarks/data_path.py [FOLDER] [--repeats 3]
    python benchmarks/data_path.py --many 200000

The first command serves the photographs in FOLDER (class folders; without it, 720
drawn ones) through an S3 server on this machine and measures, in turn, in one run:
one pass of dask-pytorch-ddp's S3ImageFolder and of a folder read through fsspec, each
in a DataLoader with two worker processes; a cold preparation on one and on two Dask
workers; and batches of what was prepared. The second prepares so many small files,
and a quarter of them, and shows time and memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ["GAN_LIB_HEADLESS"] = "1"

import fsspec
import numpy as np
import torch
from dask_pytorch_ddp.data import S3ImageFolder
from distributed import Client
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gan_lib.batches import Batches
from gan_lib.cluster import close_cluster, start_cluster
from gan_lib.images import ImageSet, prepare_images
from gan_lib.parameters import TrainingParameters
from gan_lib.practice import make_photographs
from gan_lib.s3_server import serve_s3

IMAGE_SIZE = 64
BATCH_SIZE = 64
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
            return TRANSFORM(Image.open(file).convert("RGB")), 0


def one_pass(dataset: Dataset) -> float:
    """Images per second of one pass of a DataLoader with two worker processes."""
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=2)
    started = time.perf_counter()
    n = sum(len(images) for images, _ in loader)
    return n / (time.perf_counter() - started)


def preparation(url: str, client: Client) -> tuple[float, ImageSet]:
    """Images per second of a cold preparation, and what was prepared."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        images = prepare_images(url, IMAGE_SIZE, client=client, cache=cache)
        seconds = time.perf_counter() - started
        in_memory = ImageSet(np.asarray(images.pixels), images.labels, images.classes)
    return len(images) / seconds, in_memory


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
            Path(store, "bucket", "Images"),
            ignore=lambda folder, names: [
                name for name in names if Path(folder, name).is_file() and name[-4:] != ".jpg"
            ],
        )
        url = "s3://bucket/Images"
        rates: dict[str, list[float]] = {}

        def measured(name: str, rate: float) -> None:
            rates.setdefault(name, []).append(rate)

        # Before there is a cluster: a DataLoader forks, and a fork and threads do not go together.
        for _ in range(repeats):
            of_folder = S3ImageFolder("bucket", "Images/", transform=TRANSFORM)
            measured("S3ImageFolder, DataLoader with 2 processes", one_pass(of_folder))
            measured("fsspec folder, DataLoader with 2 processes", one_pass(FsspecFolder(url)))
        for workers in (1, 2):
            client = start_cluster(workers, device="cpu")
            try:
                # The first task of a worker imports what all others use; of eight, each gets some.
                prepare_images(
                    url, 16, client=client, max_images=256, cache=f"{store}/warm{workers}"
                )
                for _ in range(repeats):
                    rate, images = preparation(url, client)
                    measured(f"cold preparation, Dask workers: {workers}", rate)
            finally:
                close_cluster(client)
        for _ in range(repeats):
            gathered, normalised = batches(images)
            measured("batches of prepared images, uint8", gathered)
            measured("batches of prepared images, normalised", normalised)
    print(f"{len(images)} photographs, {IMAGE_SIZE} x {IMAGE_SIZE}, median of {repeats}")
    base = statistics.median(rates["S3ImageFolder, DataLoader with 2 processes"])
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"  {name:44} {rate:12,.0f} images/s  {rate / base:8,.1f} x")


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
    import gan_lib.cluster  # noqa: F401


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
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.many:
        many(options.many)
        return
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.folder or make_photographs(drawn, 720, dirt=False)
        compare(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
