"""What do supervision and checkpoints cost a training?

    python benchmarks/supervision.py [--repeats 3]

Measured in one run, in turn, on two ranks: a training that keeps nothing; the same that keeps
records and pictures in a run directory; and the same again, launched as a job that is watched
over, and with checkpoints.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

os.environ["GAN_LIB_HEADLESS"] = "1"

from distributed import Client

from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.training.rank import train_gan

# DCGAN at 64 x 64 is 25 MB of weights, 76 MB with its optimisers: after every 16 steps a
# checkpoint, and a picture of 64 images.
PARAMETERS = TrainingParameters(
    batch_size=64, max_images=512, epochs=4, checkpoint_every=2, record_every=1, sample_every=2
)
NOTHING, RECORDS, ALL = "nothing", "records and pictures", "and supervision and checkpoints"


def alone(p: TrainingParameters, run: str | None) -> float:
    """Images per second of two ranks that nobody watches over."""
    return train_gan(p, run=run, progress=False).images_per_second


def measure(client: Client, what: str) -> float:
    """Images per second of one training."""
    with tempfile.TemporaryDirectory() as folder:
        if what == ALL:
            job = launch(client, PARAMETERS, run=f"{folder}/run")
            return job.result()[0].images_per_second
        # The last epoch has its checkpoint in any case, but no step waits for it.
        p = PARAMETERS.replace(checkpoint_every=1_000_000)
        run = f"{folder}/run" if what == RECORDS else None
        return run_ranks(client, alone, device="cpu", p=p, run=run)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rates: dict[str, list[float]] = {NOTHING: [], RECORDS: [], ALL: []}
    client = start_cluster(2, device="cpu")
    try:
        measure(client, NOTHING)  # the first training of a worker is slower
        for _ in range(repeats):
            for what, found in rates.items():
                found.append(measure(client, what))
    finally:
        close_cluster(client)
    print(f"images/s of two ranks, median of {repeats}: {PARAMETERS.epochs * 8} steps at 64 x 64")
    for what, found in rates.items():
        print(f"  {what:32s} {statistics.median(found):6.1f}{_ratio(found, rates[NOTHING])}")
    print(f"supervision and checkpoints alone     {_ratio(rates[ALL], rates[RECORDS])}")


def _ratio(rates: list[float], base: list[float]) -> str:
    ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
    return f"  {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
