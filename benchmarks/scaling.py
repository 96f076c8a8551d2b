r"""What do more ranks bring, and what would a thousand?

    python benchmarks/scaling.py [--address tcp://SCHEDULER:8786] [--ranks 1 2] [--picture P]
    python benchmarks/scaling.py --predict [--gbit 1 10 100] [--delay-ms 0.1]
    python benchmarks/scaling.py --links 50 200 [--delay-ms 0 20]

The first measures: the same batch over more ranks (strong scaling), and as many images for each
rank (weak scaling); what the ranks would take to exchange their gradients if they did nothing
else meanwhile; and what part of a step they wait for each other, or for Python, as torch's profiler
sees it (which itself slows them). The second computes what 2 to 1,000 ranks would do, from the
steps of one rank and the rate of an all-reduce, measured between the workers or given. The third
checks that: 2 and 4 ranks on hosts that are network namespaces of this machine, each of which sends
so many Mbit/s at most, to where they arrive so much later (root only): predicted first, then
measured.

The model, of ranks that are no machine's neighbours (those add up gradients in its memory): a
rank's step takes a constant and a time for each image; all ranks that share a core take turns. The
gradients of each network are exchanged at once, as gloo does it, in a ring: b bytes
over n ranks take 2 (n - 1) / n * b / rate (Patarasuk and Yuan 2009), and each of the 2 (n - 1)
times that something is passed on takes a round trip, because it is sent when its receiver has
asked for it. The generator's travel while the discriminator looks at the next real images, and cost
only what they take longer than that; of the discriminator's nothing is hidden behind computing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ |= {"GAN_LIB_HEADLESS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from distributed import Client
from step import machine
from torch import Tensor

from gan_lib.base.errors import ParameterError, UserError, describe
from gan_lib.base.memory import keep_freed_memory
from gan_lib.cluster.starting import close_cluster, connect, start_cluster
from gan_lib.data.batches import Batches
from gan_lib.data.image_set import ImageSet
from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.hosts import INTERFACE, Hosts, hosts
from gan_lib.results.timeline import Span, seconds_by_kind
from gan_lib.training.networks import Training
from gan_lib.training.ranks import Ranks, pick_device
from gan_lib.training.shared import share_sum
from gan_lib.training.tracing import trace_steps

DOGS = 20_580  # images of an epoch of Stanford Dogs
RANKS = (2, 10, 100, 1000)
PIECE = 2**20  # bytes that gloo sends at a time, at most


class Link(NamedTuple):
    """Between two ranks."""

    rate: float  # bytes per second
    delay: float = 0.0  # seconds, one way


def seconds_per_step(p: TrainingParameters, steps: int = 12) -> dict[str, Any]:
    """Of this rank: its median step, and its link.

    "batch" are the images of a step over all ranks,
    "looking" is the part of the step during which the generator's exchange may go on, "sizes" are
    the bytes of each network's exchange, "exchanging" is what both take with nothing beside them,
    and "rate" is how many bytes a second messages carry.
    """
    keep_freed_memory()
    ranks = Ranks()
    device = pick_device(p.device)
    pixels = np.random.default_rng(0).integers(
        256, size=(max(256, p.batch_size), p.image_size, p.image_size, p.channels), dtype=np.uint8
    )
    images = ImageSet(pixels, np.zeros(len(pixels), np.int64), ("image",))
    training = Training(p, ranks, device)
    batches = Batches(images, p, ranks.rank, ranks.world_size, device)
    endless = (batch for epoch in range(1, 1 + 4 * steps) for batch in batches.epoch(epoch))
    found, looked = [], []
    finish = training.finish

    def note_and_finish() -> None:
        # In a step for the first time, when the discriminator has looked at the real images.
        if len(looked) == len(found):
            looked.append(time.perf_counter() - began)
        finish()

    training.finish = note_and_finish  # type: ignore[method-assign]
    for step, batch in enumerate(endless):
        began = time.perf_counter()
        training.step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
        if step == 3 + steps:
            break
    finish()
    each = 2 if p.exchange == "bfloat16" else 4
    networks = training.networks.values()
    sizes = [each * sum(weight.numel() for weight in net.parameters()) for net in networks]
    seconds = statistics.median(found[4:])
    part = statistics.median(looked[4:]) / seconds
    told = {"batch": p.batch_size, "seconds": seconds, "looking": part, "sizes": sizes}
    if not ranks.distributed:
        return told | {"exchanging": 0.0, "rate": float("inf")}
    size = 4 * 2**20
    taken = seconds_to_add_up(torch.ones(size // 4, device=device), by_messages=True)
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * size / taken
    travelling = torch.bfloat16 if p.exchange == "bfloat16" else torch.float32
    exchanging = sum(
        seconds_to_add_up(torch.ones(s // each, dtype=travelling, device=device)) for s in sizes
    )
    return told | {"exchanging": exchanging, "rate": rate}


def seconds_to_add_up(values: Tensor, by_messages: bool = False) -> float:
    """What the ranks take for it, as `JointStep` does it or as ranks apart do."""
    bfloat16 = values.dtype == torch.bfloat16
    shared = None if by_messages or bfloat16 else share_sum([values])
    found = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        if shared:
            shared.send(values, last=True)()
        else:
            dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def exchange_seconds(ranks: int, size: float, link: Link) -> float:
    """What ranks take that add up a tensor of so many bytes by messages."""
    if ranks == 1:
        return 0.0
    # A rank's part travels in pieces, two at a time: while one is sent, the next is asked for.
    pieces = max(2, math.ceil(size / ranks / PIECE))
    sending, asking = size / ranks / pieces / link.rate, 2 * link.delay
    pairs = pieces * (ranks - 1) / 2
    # Once to add up, and once more to hand the sums round.
    return 2 * (pairs * (sending + max(sending, asking)) + min(sending, asking))


class Model:
    """What a step would take, from the steps of one rank with two sizes of batches."""

    def __init__(self, small: dict[str, Any], large: dict[str, Any]) -> None:
        more = large["batch"] - small["batch"]
        self.per_image = (large["seconds"] - small["seconds"]) / more
        self.constant = max(0.0, small["seconds"] - self.per_image * small["batch"])
        self.looking = large["looking"]
        self.sizes = large["sizes"]

    def step(self, batch: int, ranks: int, link: Link, ranks_per_core: float = 1.0) -> float:
        """Seconds of a step of `ranks`."""
        computing = (self.constant + self.per_image * batch / ranks) * ranks_per_core
        of_g, of_d = (exchange_seconds(ranks, size, link) for size in self.sizes)
        return computing + of_d + max(0.0, of_g - self.looking * computing)

    def efficiency(self, batch: int, ranks: int, link: Link) -> float:
        """What part of `ranks` times one rank's images per second they reach together."""
        return self.step(batch, 1, link) / ranks / self.step(batch, ranks, link)

    def batch_for(self, efficiency: float, ranks: int, link: Link) -> int:
        """The smallest power of two that reaches it; 0 if none up to four million does."""
        sizes = (2**k for k in range(23) if 2**k >= ranks)
        return next((b for b in sizes if self.efficiency(b, ranks, link) >= efficiency), 0)


def model_of(p: TrainingParameters, client: Client) -> Model:
    """From the first worker alone."""
    told = []
    for batch in (p.batch_size // 4, p.batch_size):
        told += run_ranks(
            client, seconds_per_step, 1, device=p.device, p=p.replace(batch_size=batch)
        )
    return Model(*told)


def measure(p: TrainingParameters, client: Client, ranks: list[int], picture: str | None) -> None:
    """Print, and draw, what each number of ranks reaches."""
    rates: dict[str, list[float]] = {"strong": [], "weak": []}
    labels = {"strong": "one batch, shared", "weak": "a batch for each rank"}
    columns = "scaling", "ranks", "batch", "images/s", "efficiency", "ms a step", "to exchange"
    columns += ("waiting", "Python")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    for kind, found in rates.items():
        for n in ranks:
            batch = p.batch_size * (n if kind == "weak" else 1)
            told = p.replace(batch_size=batch)
            steps = run_ranks(client, seconds_per_step, n, device=p.device, p=told)
            seconds = max(step["seconds"] for step in steps)
            found.append(batch / seconds)
            efficiency = found[-1] / found[0] * ranks[0] / n
            exchanging = max(step["exchanging"] for step in steps)
            traces = run_ranks(client, trace_steps, n, device=p.device, parameters=told)
            parts = [part_of_step(spans, "waiting", "Python") for spans in traces]
            figures = f"{found[-1]:,.0f}", f"{efficiency:.2f}", f"{1e3 * seconds:.1f}"
            shares = (f"{100 * statistics.mean(part):.0f} %" for part in zip(*parts, strict=True))
            print_row(kind, str(n), str(batch), *figures, f"{1e3 * exchanging:.1f}", *shares)
    if picture:
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for kind, found in rates.items():
            axes.plot(ranks, found, "o-", label=labels[kind])
        ideal = [rates["strong"][0] * n / ranks[0] for n in ranks]
        axes.plot(ranks, ideal, "--", color="0.5", label="ideal")
        axes.set(title="images per second by ranks", xlabel="ranks", ylabel="images/s", ylim=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.savefig(picture, dpi=120)
        print(picture)


def part_of_step(spans: Sequence[Span], *kinds: str) -> list[float]:
    """What part of one rank's step it spends on each of these."""
    seconds = seconds_by_kind(spans)
    whole = sum(seconds.values()) - seconds["exchange"]
    return [seconds[kind] / whole for kind in kinds]


def predict(p: TrainingParameters, client: Client, gbit: list[float], ms: list[float]) -> None:
    """Print what 2 to 1,000 ranks would do, each with a core or a GPU like that of the first."""
    model = model_of(p, client)
    links = {
        f"{g:g} Gbit/s, {delay:g} ms": Link(g * 1e9 / 8, delay / 1000) for g in gbit for delay in ms
    }
    if not links:
        n = len(client.nthreads())
        if n == 1:
            raise ParameterError("one worker has no link to measure: start more, or give --gbit")
        told = run_ranks(client, seconds_per_step, n, device=p.device, p=p)
        rate = min(t["rate"] for t in told)
        links = {f"measured, {rate * 8e-9:.1f} Gbit/s": Link(rate)}
    print(
        f"a step of one rank: {1e3 * model.constant:.1f} ms and {1e3 * model.per_image:.3f} ms for "
        f"each image; {sum(model.sizes) / 1e6:.1f} MB are exchanged\n"
    )
    print_row("link", "ranks", "batch", "images/s", "efficiency", "epoch of dogs, s", "0.9 from")
    print_row(*["---"] * 7)
    for name, link in links.items():
        for n in RANKS:
            batch = max(p.batch_size, 16 * n)
            speed = batch / model.step(batch, n, link)
            fits = model.batch_for(0.9, n, link)
            print_row(
                name, f"{n:,}", f"{batch:,}", f"{speed:,.0f}",
                f"{model.efficiency(batch, n, link):.2f}", f"{DOGS / speed:.1f}",
                f"{fits:,}" if fits else "never",
            )  # fmt: skip


def as_rank(p: TrainingParameters, rank: int, n: int) -> None:
    """On a host: take part, and print what was found."""
    torch.set_num_threads(1)
    if n > 1:
        os.environ.update(MASTER_PORT="29500", GLOO_SOCKET_IFNAME=INTERFACE)
        dist.init_process_group("gloo", rank=rank, world_size=n)
    print(json.dumps(seconds_per_step(p)), flush=True)
    if n > 1:
        dist.destroy_process_group()


def run_apart(p: TrainingParameters, on: Hosts | None = None) -> list[dict[str, Any]]:
    """One rank on each host; without hosts, one rank where this process is."""
    n = len(on.addresses) if on else 1
    environment = os.environ | ({"MASTER_ADDR": on.addresses[0]} if on else {})
    # Those of one machine share its cores.
    told = ["--batch", str(p.batch_size), "--size", str(p.image_size), "--width", str(p.ngf)]
    told += ["--precision", p.precision, "--exchange", p.exchange]
    ranks = []
    for rank in range(n):
        inside = on.inside(rank) if on else []
        command = [*inside, sys.executable, __file__, *told, "--as-rank", str(rank), str(n)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def check(p: TrainingParameters, mbit: list[float], delays_ms: list[float]) -> None:
    """Print what is predicted for 2 and 4 ranks over slow links, and then what they do."""
    (small,), (large,) = (
        run_apart(p.replace(batch_size=n)) for n in (p.batch_size // 4, p.batch_size)
    )
    model = Model(small, large)
    columns = "ranks", "delay, ms", "Mbit/s", "predicted, ms", "measured, ms"
    print_row(*columns, "measured / predicted")
    print_row(*["---"] * 6)
    for n, delay, rate in itertools.product((2, 4), delays_ms, mbit):
        crowd = max(1.0, n / (os.cpu_count() or 1))
        link = Link(rate * 1e6 / 8, delay / 1000)
        predicted = model.step(p.batch_size, n, link, crowd)
        print(f"| {n} | {delay:g} | {rate:g} | {1e3 * predicted:.0f} |", end=" ", flush=True)
        with hosts(n, delay) as slow:
            for host in range(n):
                slow.limit(host, rate)
            measured = max(rank["seconds"] for rank in run_apart(p, slow))
        print(f"{1e3 * measured:.0f} | {measured / predicted:.2f} |", flush=True)


def print_row(*cells: str) -> None:
    """Of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a scheduler; without, workers on this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--width", type=int, default=32, help="ngf and ndf")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--exchange", default="float32", help="or bfloat16: half the bytes")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--gbit", type=float, nargs="*", default=[], help="rates of the links")
    parser.add_argument("--links", type=float, nargs="+", help="Mbit/s to check it at")
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0], help="of the links")
    parser.add_argument("--picture", help="draw into this file")
    parser.add_argument("--as-rank", type=int, nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    p = TrainingParameters(
        image_size=told.size, ngf=told.width, ndf=told.width, batch_size=told.batch,
        device=told.device, precision=told.precision, exchange=told.exchange,
    )  # fmt: skip
    if told.as_rank:
        sys.exit(as_rank(p, *told.as_rank))
    print(f"{machine(pick_device(p.device))}, {p.precision}", flush=True)
    try:
        if told.links:
            sys.exit(check(p, told.links, told.delay_ms))
        client = (
            connect(told.address, max(told.ranks))
            if told.address
            else start_cluster(max(told.ranks), told.device)
        )
        try:
            if told.predict:
                predict(p, client, told.gbit, told.delay_ms)
            else:
                measure(p, client, told.ranks, told.picture)
        finally:
            close_cluster(client)
    except (UserError, OSError) as error:
        sys.exit(f"error: {describe(error)}")


if __name__ == "__main__":
    main()
