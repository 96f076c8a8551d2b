"""How much faster do two ranks train than one, on two cores?

    python benchmarks/ranks.py [--repeats 12] [--only 64]

Measured in one run, in rounds, each in an order of its own: one rank on one core; two ranks on two
cores, which share memory, and the same with messages in its place; two runs of one rank, side by
side as in a sweep, with the whole batch each, and with half of it each, which is what two ranks
would reach if they never had to meet; one process that uses both cores by itself. A machine's speed
may change from one minute to the next, so what counts are ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

os.environ["GAN_LIB_HEADLESS"] = "1"

import torch
from distributed import Client
from step import machine

from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.jobs.launching import run_ranks
from gan_lib.training import shared
from gan_lib.training.rank import train_gan

SETTINGS: dict[str, dict[str, Any]] = {
    "32 x 32, ngf = ndf = 32": {
        "image_size": 32, "channels": 1, "ngf": 32, "ndf": 32, "epochs": 4,
    },
    "64 x 64, ngf = ndf = 64": {"max_images": 192, "epochs": 3},
}  # fmt: skip


def rate(parameters: dict[str, Any], by_messages: bool = False) -> float:
    """Images per second of one training over all its ranks, after the first epoch."""
    with patch.object(shared, "MOST_RANKS", 0 if by_messages else shared.MOST_RANKS):
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


def ways(client: Client, parameters: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """What is compared: each returns images per second."""
    half = parameters | {"batch_size": parameters["batch_size"] // 2}

    def ranks(n: int, by_messages: bool = False) -> float:
        told = {"parameters": parameters, "by_messages": by_messages}
        return float(run_ranks(client, rate, n_workers=n, device="cpu", **told)[0])

    return {
        "one process, two threads": lambda: rate(parameters),
        "one rank on one core": lambda: ranks(1),
        "two ranks on two cores": lambda: ranks(2),
        "... by messages": lambda: ranks(2, by_messages=True),
        "two runs of one rank, at once": lambda: side_by_side(client, parameters),
        "... of half the batch": lambda: side_by_side(client, half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--only", default="", help="the setting that begins so, such as 64")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{machine(torch.device('cpu'))}, float32", flush=True)
    client = start_cluster(2, device="cpu")
    try:
        for name, told in SETTINGS.items():
            if not name.startswith(options.only):
                continue
            compared = ways(client, {"batch_size": 64, **told})
            found: dict[str, list[float]] = {way: [] for way in compared}
            for turn in range(options.repeats):
                for way in random.Random(turn).sample(sorted(compared), len(compared)):
                    found[way].append(compared[way]())
            first, *_ = found.values()
            print(f"{name}: images/s, and of one process, medians of {options.repeats}")
            for way, rates in found.items():
                ratio = statistics.median(a / b for a, b in zip(rates, first, strict=True))
                print(f"  {way:30} {statistics.median(rates):7.0f}   {ratio:.2f}", flush=True)
    finally:
        close_cluster(client)


if __name__ == "__main__":
    main()
