"""What may be wrong with the workers of a cluster."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from dask.system import CPU_COUNT
from distributed import Scheduler
from distributed.comm.addressing import get_address_host

from gan_lib.base.errors import describe
from gan_lib.cluster.workers import ask, assign_places
from gan_lib.doctor.finding import Finding, judge, name_some, not_checked, ok
from gan_lib.doctor.patient import BYTES_OF_RANK, Patient

# What two processes must have in common to understand each other, beside gan_lib itself.
ALIKE = ("Python", "dask", "distributed")
# A rank of another torch or NCCL computes something else, or waits for ever.
ALIKE_ON_WORKERS = ("torch", "CUDA", "NCCL")
SIZE_OF_PRODUCT = 512


def cluster(patient: Patient) -> Finding:
    """A scheduler answers, and its workers can be given this gan_lib."""
    patient.open()
    workers = patient.opened().nthreads()
    hosts = {get_address_host(worker) for worker in workers}
    return ok(f"{len(workers)} workers, on {name_some(hosts)}")


def versions(patient: Patient) -> Finding:
    """Python and Dask are the same everywhere, torch and NCCL on all workers."""
    client = patient.opened()
    on_workers = patient.on_workers(_versions)
    asked: Any = ask(client, client.get_versions)
    told = asked["scheduler"]["packages"]
    told["Python"] = ".".join(told["python"].split(".")[:2])
    everywhere = {"the client": _versions(), "the scheduler": told, **on_workers}
    lines = []
    for names, places in ((ALIKE, everywhere), (ALIKE_ON_WORKERS, on_workers)):
        for name in names:
            values = {place: found.get(name) for place, found in places.items()}
            if len(set(values.values())) > 1:
                lines.append(f"{name}: {_tally(values)}")
    well = ", ".join(f"{name} {value}" for name, value in next(iter(on_workers.values())).items())
    cure = "install what requirements.lock names where the workers run, and start them again"
    return judge(lines, [], f"the same everywhere: {well}", cure)


def _versions() -> dict[str, str]:
    import torch

    found = {"Python": f"{sys.version_info[0]}.{sys.version_info[1]}", "torch": torch.__version__}
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        with contextlib.suppress(Exception):
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**found, **{name: version(name) for name in ("dask", "distributed")}}


def _tally(values: Mapping[str, str | None]) -> str:
    """Which worker has what: "2.14.1 on A, B and 6 more, 2.11.0 on C", the rarest last."""
    by_value: dict[str, list[str]] = {}
    for worker, value in values.items():
        by_value.setdefault(value or "none", []).append(worker)
    common = sorted(by_value.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{value} on {name_some(who)}" for value, who in common)


def workers(patient: Patient) -> Finding:
    """Each worker has one thread for tasks, cores for torch's, a nanny, and memory for a rank."""
    client = patient.opened()
    told = ask(client, lambda: client.run_on_scheduler(_told))
    given = patient.on_workers(_torch_threads)
    several = {w: f"{n} threads" for w, (n, _, _) in told.items() if n != 1}
    alone = {w: "no nanny" for w, (_, _, nanny) in told.items() if not nanny}
    # Dask pauses a worker at 80 % of its limit, and a rank then never ends.
    small = {
        w: f"{limit / 2**20:.0f} MB as a limit of memory, less than a rank needs,"
        for w, (_, limit, _) in told.items()
        if limit and 0.8 * limit < BYTES_OF_RANK
    }
    on_host: Counter[str] = Counter()
    for w, (n_threads, _) in given.items():
        on_host[get_address_host(w)] += n_threads
    crowded = {
        w: f"{on_host[get_address_host(w)]} threads of torch on {n_cores} cores"
        for w, (_, n_cores) in given.items()
        if on_host[get_address_host(w)] > n_cores
    }
    # A nanny of Dask tells torch to use one thread, if nobody else has told it.
    idle = {
        w: f"threads of torch that leave half of {n_cores} cores idle"
        for w, (_, n_cores) in given.items()
        if 0 < 2 * on_host[get_address_host(w)] <= n_cores
    }
    lines = [_tally(odd) for odd in (several, alone, crowded, idle) if odd]
    cure = (
        "start one for each rank: `OMP_NUM_THREADS=N MKL_NUM_THREADS=N dask worker ADDRESS "
        "--nthreads 1 --nanny --memory-limit 0`, where N is the cores of its machine shared among "
        "the workers there"
    )
    well = "one thread, a nanny and enough memory each"
    return judge([_tally(small)] if small else [], lines, well, cure)


def _told(dask_scheduler: Scheduler) -> dict[str, tuple[int, int | None, bool]]:
    """On the scheduler: worker -> threads, memory limit in bytes, whether it has a nanny."""
    return {
        address: (worker.nthreads, worker.memory_limit, bool(worker.nanny))
        for address, worker in dask_scheduler.workers.items()
    }


def _torch_threads() -> tuple[int, int]:
    """On a worker: threads of torch, and cores; with a GPU they do not matter, and are 0."""
    import torch

    return (0, 0) if torch.cuda.is_available() else (torch.get_num_threads(), CPU_COUNT)


def one_gpu_each(patient: Patient) -> Finding:
    """Each worker has a GPU of its own."""
    from gan_lib.jobs.rank_group import pick_gpus
    from gan_lib.jobs.rank_task import visible_gpus

    device = patient.parameters.device
    seen = patient.on_workers(visible_gpus) if device != "cpu" else {}
    if device != "cuda" and not any(seen.values()):
        return not_checked("no GPUs, or none wanted")
    places = assign_places(seen, None)
    gpus = [seen[place.worker] for place in places]
    without = [place.worker for place, own in zip(places, gpus, strict=True) if not own]
    lines = [f"no GPU on {name_some(without)}"] if without else []
    indices, backend = pick_gpus(gpus, [place.local_rank for place in places])
    if not without and backend != "nccl":
        users = Counter(own[i] for own, i in zip(gpus, indices, strict=True))
        lines += [f"{n} workers share the GPU {gpu}" for gpu, n in users.items() if n > 1]
    cure = (
        "start one worker for each GPU, which sees it alone: `dask cuda worker`, or `dask worker "
        "--nthreads 1` with CUDA_VISIBLE_DEVICES=0 for the first, =1 for the second"
    )
    must = device == "cuda" and without
    return judge(lines if must else [], [] if must else lines, f"{len(seen)} GPUs, NCCL", cure)


def arithmetic(patient: Patient) -> Finding:
    """Each worker multiplies matrices as it should."""
    p = patient.parameters
    found = patient.on_workers(_product, p.device, p.precision)
    wrong = [f"{worker}: {why}" for worker, why in found.items() if why]
    cure = "leave that machine or GPU out: its memory, its driver or its build of torch is damaged"
    return judge(wrong, [], "a product of matrices is right on each worker", cure)


def _product(device: str, precision: str) -> str:
    """On a worker: what is wrong with products of two matrices; empty if nothing is."""
    import torch

    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    kinds = {torch.float32: 1e-3} | ({torch.bfloat16: 0.1} if precision != "float32" else {})
    a, b = torch.randn(2, SIZE_OF_PRODUCT, SIZE_OF_PRODUCT, dtype=torch.float64)
    for place in [f"cuda:{i}" for i in range(n_gpus)] or ["cpu"]:
        for kind, most in kinds.items():
            try:
                product = a.to(place, kind) @ b.to(place, kind)
                # Errors add up as the products do: over so many of them to their root.
                off = (product.cpu().double() - a @ b).abs().max().item() / SIZE_OF_PRODUCT**0.5
            except Exception as error:
                return f"a product of matrices in {kind} on {place}: {describe(error)}"
            if not off < most:  # NaN is not, either
                return f"a product of matrices in {kind} on {place} is off by {off:.2g}"
    return ""
