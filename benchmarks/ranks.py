"""How much faster do two ranks train than one, on two cores? And what does the exchange cost?

    python benchmarks/ranks.py [--repeats 3] [--only 64]

Measured in one run, in turn: one rank on one core; two ranks on two cores; two runs of one
rank, side by side as in a sweep, with the whole batch each, and with half of it each, which is what
two ranks would reach if they never had to meet; one process that uses both cores by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ["GAN_LIB_HEADLESS"] = "1"

import torch
from distributed import Client
from step import machine

from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.jobs.launching import run_ranks
from gan_lib.training.rank import train_gan

SETTINGS: dict[str, dict[str, Any]] = {
    "32 x 32, ngf = ndf = 32": {
        "image_size": 32, "channels": 1, "ngf": 32, "ndf": 32, "batch_size": 64, "epochs": 7,
    },
    "64 x 64, ngf = ndf = 64": {"batch_size": 64, "epochs": 3, "max_images": 512},
}  # fmt: skip


def rate(parameters: dict[str, Any]) -> float:
    """Images per second of one training over all its ranks, after the first epoch."""
    records = train_gan(parameters, progress=False).records
    # Only rank 0 has them.
    found = [r["images_per_second"] for r in records if r["epoch"] > 1]
    return statistics.median(found) if found else 0.0


def side_by_side(client: Client, parameters: dict[str, Any]) -> float:
    """Images per second of two runs at the same time, each on a worker of its own, together."""

    def one(seed: int) -> float:
        told = parameters | {"seed": seed}
        (found,) = run_ranks(client, rate, n_workers=1, device="cpu", parameters=told)
        return float(found)

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(one, range(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="the setting that begins so, such as 64")
    options = parser.parse_args()
    repeats = options.repeats
    torch.set_num_threads(2)
    print(f"{machine(torch.device('cpu'))}, float32", flush=True)
    client = start_cluster(2, device="cpu")
    try:
        for name, parameters in SETTINGS.items():
            if not name.startswith(options.only):
                continue
            rates: dict[str, list[float]] = {
                "one rank": [], "two ranks": [], "two runs": [], "halves": [], "one process": [],
            }  # fmt: skip
            for _ in range(repeats):
                one = run_ranks(client, rate, n_workers=1, device="cpu", parameters=parameters)
                two = run_ranks(client, rate, n_workers=2, device="cpu", parameters=parameters)
                rates["one rank"].append(one[0])
                rates["two ranks"].append(two[0])
                rates["two runs"].append(side_by_side(client, parameters))
                half = parameters | {"batch_size": parameters["batch_size"] // 2}
                rates["halves"].append(side_by_side(client, half))
                rates["one process"].append(rate(parameters))
            middle = {k: statistics.median(v) for k, v in rates.items()}
            print(f"{name}: median of {repeats}, images/s")
            print(f"  one rank on one core          {middle['one rank']:7.0f}   1.00")
            for key, what in (
                ("two ranks", "two ranks on two cores"),
                ("two runs", "two runs of one rank, at once"),
                ("halves", "... of half the batch"),
                ("one process", "one process, two threads"),
            ):
                print(f"  {what:29s} {middle[key]:7.0f}   {middle[key] / middle['one rank']:.2f}")
    finally:
        close_cluster(client)


if __name__ == "__main__":
    main()
