"""How much faster do two ranks train than one, on two cores?

    python benchmarks/ranks.py [--rounds 40] [--seconds 2] [--only 64]

Compared are one process that uses both cores by itself; one rank on one core; two ranks on two
cores, which share memory, and the same with messages in its place; two runs of one rank, side by
side as in a sweep, with the whole batch each, and with half of it each, which is what two ranks
would reach if they never had to meet.

A machine's speed may change by half from one minute to the next. So all of them are started first,
and held (SIGSTOP) wherever they are. Then, in each round, one after the other goes on for some
seconds, in an order of its own: all see the machine in each of its moods.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["GAN_LIB_HEADLESS"] = "1"

import torch
from distributed import Client
from step import machine

from gan_lib.cluster import workers
from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.cluster.workers import in_thread
from gan_lib.data.batches import Batch
from gan_lib.jobs.launching import run_ranks
from gan_lib.training import ranks, shared
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan

SETTINGS: dict[str, dict[str, Any]] = {
    "32 x 32, ngf = ndf = 32": {"image_size": 32, "channels": 1, "ngf": 32, "ndf": 32},
    "64 x 64, ngf = ndf = 64": {"max_images": 192},
}
BATCH = 64
END = "end"
# In the first steps, each process finds its memory.
FIRST_STEPS = 5


def train(parameters: dict[str, Any], steps: str, by_messages: bool = False) -> None:
    """Train until `END` is in the folder `steps`; a file there gets a byte for each step."""
    step = Training.step
    end = Path(steps, END)
    with open(Path(steps, str(os.getpid())), "wb", buffering=0) as done:

        def step_and_tell(training: Training, batch: Batch) -> dict[str, torch.Tensor]:
            losses = step(training, batch)
            if training.ranks.rank == 0:
                done.write(b".")
            if end.exists():
                ranks.LEAVE.set()
            return losses

        with (
            patch.object(shared, "MOST_RANKS", 0 if by_messages else shared.MOST_RANKS),
            patch.object(Training, "step", step_and_tell),
        ):
            try:
                train_gan(parameters, progress=False)
            finally:
                ranks.LEAVE.clear()


class Way:
    """Trainings on a cluster of their own, which go on when it is their turn.

    Args:
        start: begins one of them, and waits for its end; gets a client and the folder for steps.
        n_workers: of the cluster: it has two cores, and each worker an equal share.
        n_trainings: how many go on at the same time.
        images: of a step of one of them.
    """

    def __init__(
        self,
        start: Callable[[Client, str], Any],
        n_workers: int = 2,
        n_trainings: int = 1,
        images: int = BATCH,
    ) -> None:
        self._images = images
        self._folder = Path(tempfile.mkdtemp())
        self._client = start_cluster(n_workers, device="cpu")
        self._processes = list(self._client.run(os.getpid).values())
        self._trainings = [
            in_thread(lambda: start(self._client, str(self._folder))) for _ in range(n_trainings)
        ]
        while len(self._steps()) < n_trainings or min(self._steps()) < FIRST_STEPS:
            self._check()
            time.sleep(0.1)
        self._send(signal.SIGSTOP)

    def rate(self, seconds: float) -> float:
        """Images per second of its trainings together, which go on for so long."""
        before, began = sum(self._steps()), time.perf_counter()
        self._send(signal.SIGCONT)
        time.sleep(seconds)
        self._send(signal.SIGSTOP)
        took = time.perf_counter() - began
        self._check()
        return (sum(self._steps()) - before) * self._images / took

    def close(self) -> None:
        """End its trainings, and its cluster."""
        (self._folder / END).touch()
        self._send(signal.SIGCONT)
        for training in self._trainings:
            training.exception()
        close_cluster(self._client)
        shutil.rmtree(self._folder)

    def _send(self, what: signal.Signals) -> None:
        for process in self._processes:
            os.kill(process, what)

    def _steps(self) -> list[int]:
        """How many each training has done."""
        sizes = (path.stat().st_size for path in self._folder.iterdir())
        return [size for size in sizes if size]  # a rank other than the first tells none

    def _check(self) -> None:
        """Raise what has ended a training."""
        for training in self._trainings:
            if training.done():
                raise RuntimeError(f"a training has ended: {training.result()}")


def ways(told: dict[str, Any]) -> dict[str, Callable[[], Way]]:
    """What is compared, by name; each is started by a call."""
    whole = {"batch_size": BATCH, "epochs": 100_000, "device": "cpu"} | told
    half = whole | {"batch_size": BATCH // 2}

    def alone(client: Client, steps: str) -> None:
        client.submit(train, whole, steps, pure=False).result()

    def as_ranks(
        n: int, parameters: dict[str, Any] = whole, by_messages: bool = False
    ) -> Callable[[Client, str], Any]:
        each = {"parameters": parameters, "by_messages": by_messages}
        return lambda client, steps: run_ranks(client, train, n, device="cpu", steps=steps, **each)

    return {
        "one process, two threads": lambda: Way(alone, n_workers=1),
        "one rank on one core": lambda: Way(as_ranks(1)),
        "two ranks on two cores": lambda: Way(as_ranks(2)),
        "... by messages": lambda: Way(as_ranks(2, by_messages=True)),
        "two runs of one rank, at once": lambda: Way(as_ranks(1), n_trainings=2),
        "... of half the batch": lambda: Way(as_ranks(1, half), n_trainings=2, images=BATCH // 2),
    }


def compare(told: dict[str, Any], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images per second of each way, by round."""
    with ExitStack() as ends:
        # Those that are held do not hang.
        ends.enter_context(patch.object(workers, "SECONDS_OF_SILENCE", 3600.0))
        started = {}
        for name, start in ways(told).items():
            started[name] = start()
            ends.callback(started[name].close)
        found: dict[str, list[float]] = {name: [] for name in started}
        for turn in range(rounds):
            for name in random.Random(turn).sample(sorted(started), len(started)):
                found[name].append(started[name].rate(seconds))
        return found


def ratio(rates: list[float], to: list[float]) -> tuple[float, float]:
    """Of their means, and by how much chance would change it: how far apart rounds are."""
    found = statistics.mean(rates) / statistics.mean(to)
    differences = [a - found * b for a, b in zip(rates, to, strict=True)]
    return found, statistics.stdev(differences) / len(rates) ** 0.5 / statistics.mean(to)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in each round")
    parser.add_argument("--only", default="", help="the setting that begins so, such as 64")
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}, float32", flush=True)
    for name, told in SETTINGS.items():
        if name.startswith(options.only):
            found = compare(told, options.rounds, options.seconds)
            first, *_ = found.values()
            print(f"{name}: images/s, and of one process, in {options.rounds} rounds")
            for way, rates in found.items():
                of_one, error = ratio(rates, first)
                print(f"  {way:30} {statistics.mean(rates):7.0f}   {of_one:.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
