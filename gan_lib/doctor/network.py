"""What may be wrong between the workers: gloo and NCCL connect each with each, on any free port."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from typing import Any

import psutil
from distributed import Client, Future, Worker
from distributed.comm.addressing import get_address_host

from gan_lib.base.errors import ClusterError, UserError, describe
from gan_lib.cluster.workers import Place, Watch, find_places
from gan_lib.doctor.finding import FAULT, Finding, judge, name_some, not_checked
from gan_lib.doctor.patient import Patient

SECONDS_TO_KNOCK = 10.0
# More than one packet of any network, so that they are as large as they get.
KNOCK = 64 * 1024
# The ranks may first have to import torch.
SECONDS_TO_EXCHANGE = 60.0
STEPS, STEPS_TO_WARM_UP = 10, 3
# A gigabit a second carries the gradients of `profiles/article.yaml` in a fifth of it.
SLOW_MS = 1000.0
OPEN_PORTS = (
    "let the machines of the workers reach each other on all TCP ports (a firewall or a security "
    "group may let only Dask's through): gloo and NCCL take any free one; or start the workers "
    "with `--interface NAME` of a network that they share"
)
SWALLOWED = "small packets arrive, and large ones do not"
SAME_MTU = (
    "give all interfaces on the way between the workers the same MTU "
    "(`ip link set dev NAME mtu 1500`, on each machine)"
)
_DOORS: list[asyncio.Server] = []


def pairs(patient: Patient) -> Finding:
    """Each worker reaches each other one on a free port, with large packets too."""
    try:
        # Dask awaits what is a coroutine.
        opened: dict[str, Any] = patient.on_workers(_open_door)
        doors = {worker: (host, port) for worker, (host, port, *_) in opened.items()}
        closed: dict[str, Any] = patient.on_workers(_knock, doors)
    finally:
        patient.on_workers(_close_door)
    if len(opened) < 2:
        return not_checked("one worker has nobody to talk to")
    lines = [
        f"{worker} does not reach {name_some(others)} ({name_some(set(others.values()), 1)})"
        for worker, others in closed.items()
        if others
    ]
    cure = OPEN_PORTS
    if any(SWALLOWED in line for line in lines):
        cure = SAME_MTU
        told = [f"{mtu} on {name} of {worker}" for worker, (*_, name, mtu) in opened.items()]
        lines.append(f"the MTU is {name_some(told)}")
    interfaces = {interface for *_, interface, _ in opened.values()}
    unknown = [worker for worker, (*_, interface, _) in opened.items() if not interface]
    odd = [f"no network interface has the address of {name_some(unknown)}"] if unknown else []
    well = f"each reaches each other, by {', '.join(sorted(interfaces))}"
    return judge(lines, odd, well, cure)


async def _open_door(dask_worker: Worker) -> tuple[str, int, str, int]:
    """On a worker: listen on a free port of Dask's address; host, port, interface, its MTU.

    Raises:
        ClusterError: if that cannot be done.
    """
    from gan_lib.jobs.rank_task import dask_network

    host = get_address_host(dask_worker.address)
    try:
        door = await asyncio.start_server(_answer, host, 0, backlog=1024)
    except OSError as error:
        raise ClusterError(
            f"the worker {dask_worker.address} cannot listen at its own address "
            f"({describe(error)}): start it with `--interface NAME`, not behind another address"
        ) from None
    _DOORS.append(door)
    interface = dask_network(dask_worker).get("GLOO_SOCKET_IFNAME", "")
    told = psutil.net_if_stats().get(interface)
    return host, door.sockets[0].getsockname()[1], interface, told.mtu if told else 0


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await reader.readexactly(KNOCK)
        writer.write(b"!")
        await writer.drain()
    writer.close()


async def _knock(doors: dict[str, tuple[str, int]], dask_worker: Worker) -> dict[str, str]:
    """On a worker: the others that it does not reach -> why."""

    async def one(host: str, port: int) -> str:
        connected = False
        try:
            async with asyncio.timeout(SECONDS_TO_KNOCK):
                reader, writer = await asyncio.open_connection(host, port)
                connected = True
                try:
                    writer.write(bytes(KNOCK))
                    await reader.readexactly(1)
                finally:
                    writer.transport.abort()
        except TimeoutError as error:
            return f"port {port}: {SWALLOWED if connected else describe(error)}"
        except (OSError, EOFError) as error:
            return f"port {port}: {describe(error)}"
        return ""

    others = {worker: door for worker, door in doors.items() if worker != dask_worker.address}
    found = await asyncio.gather(*(one(*door) for door in others.values()))
    return {worker: why for worker, why in zip(others, found, strict=True) if why}


def _close_door() -> None:
    while _DOORS:
        _DOORS.pop().close()


def all_reduce(patient: Patient) -> Finding:
    """The ranks exchange gradients of this profile's size."""
    # Not at the top: it imports torch, and whether that can be done is to be found out.
    from gan_lib.jobs.rank_group import RankGroup, start_ranks

    client, p = patient.opened(), patient.parameters
    watch = Watch(client)
    futures: dict[str, Future[Any]] = {}
    try:
        places = find_places(client, patient.n_workers or 1, patient.n_workers or None, watch)
        if len(places) < 2:
            return not_checked("one rank has nobody to exchange with")
        told = {"sizes": patient.gradients(), "device": p.device}
        futures = start_ranks(client, places, p.device, _exchange, told)
        group = RankGroup(client, futures, watch)
        deadline = time.monotonic() + SECONDS_TO_EXCHANGE
        while not group.done() and time.monotonic() < deadline:
            time.sleep(0.2)
        if not group.done():
            return Finding(FAULT, *_who_is_missing(client, places))
        (backend, ms), *_ = group.result()
    except UserError:
        raise
    except Exception as error:
        notes = ", ".join(getattr(error, "__notes__", []))
        # gloo's words where a connection is open, and what is sent through it does not arrive.
        lost = "Read error" in str(error) and "timed out" in str(error)
        cure = SAME_MTU if lost else OPEN_PORTS
        return Finding(FAULT, f"{describe(error)} {notes}".strip(), cure)
    finally:
        client.cancel(list(futures.values()))
        watch.release()
    n, size = len(places), 4 * sum(patient.gradients())
    # Each rank sends and receives so much of it, however many there are.
    speed = 2 * (n - 1) / n * size / (ms / 1000)
    found = f"{n} ranks, {backend}: {size / 1e6:.1f} MB in {ms:.1f} ms a step"
    found += f", {speed / 1e6:,.0f} MB/s"
    slow = [f"slow: {found}"] if ms > SLOW_MS else []
    cure = "use fewer ranks, larger batches, or a faster network (`dask worker --interface NAME`)"
    return judge([], slow, found, cure)


def _exchange(sizes: list[int], device: str) -> tuple[str, float]:
    """On a rank: the backend, and milliseconds for what the ranks exchange in a step."""
    import torch
    import torch.distributed as dist

    from gan_lib.training.ranks import pick_device

    place = pick_device(device)
    took = []
    for _ in range(STEPS_TO_WARM_UP + STEPS):
        gradients = [torch.ones(size, device=place) for size in sizes]
        began = time.perf_counter()
        for gradient in gradients:
            dist.all_reduce(gradient)
        ends = [gradient[-1].item() for gradient in gradients]  # waits for a GPU
        took.append(time.perf_counter() - began)
        if any(end != dist.get_world_size() for end in ends):
            raise ArithmeticError(f"a sum over the ranks is {ends}, not {dist.get_world_size()}")
    # The quickest: the others also waited for what else these machines do.
    return dist.get_backend(), 1000 * min(took[STEPS_TO_WARM_UP:])


def _who_is_missing(client: Client, places: list[Place]) -> tuple[str, str]:
    """Which ranks did not come how far, and what to do about it."""
    workers = [place.worker for place in places]
    told = client.run(_stage, workers=workers, on_error="return")
    stages = [told[w] if isinstance(told[w], int) else 0 for w in workers]
    least = min(stages)
    if least == max(stages) == 3:
        return (
            f"the ranks have met, and an exchange does not end within {SECONDS_TO_EXCHANGE:.0f} s",
            f"{SAME_MTU}; or look for what is slow",
        )
    if least == max(stages) == 2:
        return "the ranks have met, and do not connect to each other", OPEN_PORTS
    missing = [f"rank {r} ({workers[r]})" for r, stage in enumerate(stages) if stage == least]
    why = (
        "did not begin: busy with other tasks, or hanging",
        f"does not reach rank 0 on {places[0].host}",
        "does not connect to the others",
    )
    cure = (
        OPEN_PORTS if least else "see what else these workers do, and how busy their machines are"
    )
    return f"{name_some(missing)} is missing: it {why[min(least, 2)]}", cure


def _stage() -> int:
    """On a worker: how far its rank is: 1 before it has met rank 0, 2 after, 3 as it exchanges."""
    import torch.distributed as dist

    from gan_lib.jobs.rank_task import await_all, meet

    stages = {meet: 1, await_all: 2, dist.init_process_group: 2, _exchange: 3}
    inside = {
        frame.name
        for thread in sys._current_frames().values()
        for frame in traceback.extract_stack(thread)
    }
    return max((n for function, n in stages.items() if function.__name__ in inside), default=0)
