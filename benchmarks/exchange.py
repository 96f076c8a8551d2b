"""What does it cost two ranks of one machine to bring their gradients together?

    python benchmarks/exchange.py [--repeats 200]

Three ways, in turn, in one run: gloo's all_reduce, which training takes; one message of gloo each
way; and memory that both see, with a number in it that says how far each has come. For each, the
time that it takes and the time that a rank computes for it, for the gradients of both networks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import machine
from torch import Tensor

from gan_lib.gan.models import discriminator_of, generator_of
from gan_lib.parameters import TrainingParameters

# Those of the silhouettes, and the article's.
SETTINGS = {
    "32 x 32": {"image_size": 32, "channels": 1, "ngf": 32, "ndf": 32},
    "64 x 64": {},
}


def by_all_reduce(gradients: Tensor, rank: int) -> None:
    """Add up the gradients of both ranks, as DDP does."""
    dist.all_reduce(gradients)


def by_messages(gradients: Tensor, rank: int) -> None:
    """The same sum: each rank sends all of its own to the other one."""
    theirs = torch.empty_like(gradients)
    sent, received = dist.isend(gradients, 1 - rank), dist.irecv(theirs, 1 - rank)
    assert sent is not None and received is not None
    received.wait()
    sent.wait()
    gradients.add_(theirs)


class Shared:
    """The same sum, through a file that both ranks have mapped.

    On x86 alone: elsewhere another processor may see the number before what was written first.
    """

    def __init__(self, path: Path, n: int) -> None:
        mapped = torch.from_file(str(path), shared=True, size=32 + 4 * n, dtype=torch.float32)
        # A cache line for each rank's number, and two places for its gradients: a rank may be one
        # exchange ahead of what the other one still reads.
        self.done = mapped[:32].view(2, 16)[:, 0].view(torch.int32).numpy()
        self.places = mapped[32:].view(2, 2, n)
        self.turn = 0

    def __call__(self, gradients: Tensor, rank: int) -> None:
        self.turn += 1
        self.places[self.turn % 2, rank].copy_(gradients)
        self.done[rank] = self.turn
        while self.done[1 - rank] < self.turn:
            time.sleep(0)
        gradients.add_(self.places[self.turn % 2, 1 - rank])


def run_rank(rank: int, folder: str, repeats: int) -> None:
    """One of the two ranks; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, told in SETTINGS.items():
        p = TrainingParameters.from_mapping(told)
        for network in (generator_of(p, None), discriminator_of(p, 0)):
            n = sum(weights.numel() for weights in network.parameters())
            ways: dict[str, Callable[[Tensor, int], None]] = {
                "all_reduce": by_all_reduce,
                "a message each way": by_messages,
                "shared memory": Shared(Path(folder, f"shared-{n}"), n),
            }
            for way, exchange in ways.items():
                gradients = torch.full((n,), rank + 1.0)
                exchange(gradients, rank)
                assert torch.all(gradients == 3), way
                gradients.zero_()
                dist.barrier()
                began, computed = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    exchange(gradients, rank)
                took = (time.perf_counter() - began) / repeats
                used = (time.process_time() - computed) / repeats
                if rank == 0:
                    print(
                        f"{name}, {type(network).__name__.lower():13} {n:9,} numbers, {way:18} "
                        f"{took * 1e3:6.2f} ms, of which {used * 1e3:5.2f} on a core",
                        flush=True,
                    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    print(machine(torch.device("cpu")), flush=True)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        mp.spawn(run_rank, (folder, options.repeats), nprocs=2)


if __name__ == "__main__":
    main()
