"""What do supervision and checkpoints cost a training?

    python benchmarks/supervision.py [--repeats 3]

Measured in one run, in turn, on two ranks: the same training launched as a job with
records, samples and checkpoints in a run directory, and run without any of that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

os.environ["GAN_LIB_HEADLESS"] = "1"

from gan_lib.cluster import close_cluster, launch, run_ranks, start_cluster
from gan_lib.parameters import TrainingParameters
from gan_lib.training import train_gan

# DCGAN at 64 x 64 is 16 MB of weights, 75 MB with its optimisers: a checkpoint every 16 steps.
PARAMETERS = TrainingParameters(
    batch_size=64, max_images=512, epochs=4, checkpoint_every=2, record_every=1, sample_every=1
)


def alone(p: TrainingParameters) -> float:
    """Images per second of two ranks that keep nothing."""
    return train_gan(p, progress=False).images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rates: dict[str, list[float]] = {"neither": [], "both": []}
    client = start_cluster(2, device="cpu")
    try:
        run_ranks(client, alone, device="cpu", p=PARAMETERS.replace(epochs=1))
        for _ in range(repeats):
            found: list[Any] = run_ranks(client, alone, device="cpu", p=PARAMETERS)
            rates["neither"].append(found[0])
            with tempfile.TemporaryDirectory() as folder:
                job = launch(client, PARAMETERS, run=f"{folder}/run")
                rates["both"].append(job.result()[0].images_per_second)
    finally:
        close_cluster(client)
    base = statistics.median(rates["neither"])
    ratios = [b / a for a, b in zip(rates["neither"], rates["both"], strict=True)]
    print(f"images/s of two ranks, {repeats} pairs: {PARAMETERS.epochs * 8} steps at 64 x 64")
    print(f"  neither supervision nor checkpoints  {base:6.1f}")
    print(f"  both                                 {statistics.median(rates['both']):6.1f}")
    print(
        f"  ratio, median of the pairs           {statistics.median(ratios):6.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
