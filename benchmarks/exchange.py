"""What does it cost two ranks of one machine to bring their gradients together?

    python benchmarks/exchange.py [--repeats 200]

Three ways, in turn, in one run: gloo's all_reduce, which training takes between machines; one
message of gloo each way; and memory that both see, which training takes on one. For each, the time
that it takes and the time that a rank computes for it, for the gradients of both networks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import machine
from torch import Tensor

from gan_lib.gan.models import discriminator_of, generator_of
from gan_lib.parameters import TrainingParameters
from gan_lib.training.shared import share_sum

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


def in_memory(like: Tensor) -> Callable[[Tensor, int], None]:
    """Their mean, through memory that both ranks see."""
    shared = share_sum([like])
    assert shared is not None, "these ranks cannot share memory"
    return lambda gradients, rank: shared.send(gradients, last=True)()


def run_rank(rank: int, folder: str, repeats: int) -> None:
    """One of the two ranks; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, told in SETTINGS.items():
        p = TrainingParameters.from_mapping(told)
        for network in (generator_of(p, None), discriminator_of(p, 0)):
            n = sum(weights.numel() for weights in network.parameters())
            ways: dict[str, tuple[Callable[[Tensor, int], None], float]] = {
                "all_reduce": (by_all_reduce, 3.0),
                "a message each way": (by_messages, 3.0),
                "shared memory": (in_memory(torch.empty(n)), 1.5),
            }
            for way, (exchange, expected) in ways.items():
                gradients = torch.full((n,), rank + 1.0)
                exchange(gradients, rank)
                assert torch.all(gradients == expected), way
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
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (folder, options.repeats), nprocs=2)


if __name__ == "__main__":
    main()
