"""What may be wrong with a machine. Where training is to run elsewhere, its workers are asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import psutil
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT
from packaging.requirements import Requirement

from gan_lib.base.addresses import is_remote, local_cache
from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import describe
from gan_lib.cluster.reach import marked
from gan_lib.doctor.finding import Finding, judge, name_some, not_checked, ok
from gan_lib.doctor.patient import BYTES_OF_RANK, Patient

# What has parts that are not Python, or is told apart by them: each fails in its own way.
IMPORTED = ("torch", "torchvision", "simplejpeg", "obstore", "matplotlib", "ipykernel")
# Notebooks as they are executed, with an HTML and the pictures of each.
BYTES_OF_NOTEBOOKS = 100 * 2**20
# NCCL exchanges through it what two GPUs of a machine say; a plain Docker container has 64 MB.
LEAST_SHARED_MEMORY = 256 * 2**20
INSTALL = (
    "install what requirements.lock names, into the environment of this Python (`make tutorial` "
    "does; by hand: pip install --no-deps --require-hashes -r requirements.lock)"
)


def packages(patient: Patient) -> Finding:
    """Python and the packages are those of requirements.lock, and can be imported."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    faults, others = [], []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        # A library that does not load raises OSError, two that do not fit RuntimeError.
        except Exception as error:
            faults.append(f"{name} cannot be imported ({describe(error)})")
    for told in [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]:
        asked = Requirement(told)
        version = _version(asked.name)
        if version is None:
            faults.append(f"{asked.name} is not installed")
        elif not asked.specifier.contains(version, prereleases=True):
            faults.append(f"{asked.name} is {version}, needed is {asked.specifier}")
    lock = (CHECKOUT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line.rstrip(" \\")) for line in lock if line[:1].isalnum()]
    for one in locked:
        version = _version(one.name) if one.marker is None or one.marker.evaluate() else None
        if version and not one.specifier.contains(version, prereleases=True):
            others.append(f"{one.name} {version}")
    differ = [f"other versions than in requirements.lock: {name_some(others)}"] if others else []
    python = f"Python {sys.version.split()[0]} in {sys.prefix}"
    return judge(faults, differ, f"{python}, packages as in requirements.lock", INSTALL)


def cores(patient: Patient) -> Finding:
    """There is a core for each worker."""
    found = f"{CPU_COUNT} of {os.cpu_count()} cores"
    if patient.ranks_here <= CPU_COUNT:
        return ok(found)
    cure = f"set n_workers to {CPU_COUNT} or less: `-p n_workers {CPU_COUNT}`, or in the profile"
    return judge([], [f"{patient.ranks_here} workers share {found}"], "", cure)


def memory(patient: Patient) -> Finding:
    """There is memory for the workers of this machine."""
    there = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    needed = BYTES_OF_RANK * (patient.ranks_here + 1)  # and this process
    found = f"{_size(there)} free, at least {_size(needed)} needed"
    cure = "close other programs, use fewer workers (n_workers), or give the container more"
    return judge([found] if there < needed else [], [], found, cure)


def disk(patient: Patient) -> Finding:
    """There is room for the run, the prepared images and the executed notebooks."""
    needs = {str(CHECKOUT): BYTES_OF_NOTEBOOKS}
    needs |= {url: size for url, size in patient.written().items() if not is_remote(url)}
    said, lines = [], []
    for path, needed in needs.items():
        there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
        free = shutil.disk_usage(there).free
        said.append(f"{_size(free)} free for {path}, about {_size(needed)} needed")
        if free < needed + 2**20:
            lines.append(said[-1])
    cure = (
        "make room, or name other places: `-p run PLACE`, and the environment variable "
        "GAN_LIB_CACHE for prepared images"
    )
    return judge(lines, [], said[-1], cure)


def cache(patient: Patient) -> Finding:
    """What is fetched and prepared can be kept."""
    place = local_cache()
    try:
        with marked(place):
            return ok(f"{place} can be written")
    except OSError as error:
        cure = "name a folder that you may write to in the environment variable GAN_LIB_CACHE"
        return judge([f"{place} cannot be written: {describe(error)}"], [], "", cure)


def kernel(patient: Patient) -> Finding:
    """Jupyter runs the notebooks in this environment."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    cure = (
        f"run `{sys.executable} -m ipykernel install --prefix {sys.prefix}`, and remove other "
        "kernels named python3 (`jupyter kernelspec list` shows them)"
    )
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return judge(["Jupyter knows no kernel python3"], [], "", cure)
    python = spec.argv[0]
    if not os.path.isabs(python):  # Jupyter then takes its own
        return ok("Jupyter's own Python")
    try:
        code = "import sys; print(sys.prefix)"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=20)
        prefix = done.stdout.strip()
    except OSError as error:
        prefix = describe(error)
    if prefix and os.path.realpath(prefix) == os.path.realpath(sys.prefix):
        return ok(f"its kernel python3 runs {python}")
    found = f"the kernel python3 of {spec.resource_dir} runs {python} ({prefix}), not this Python"
    return judge([found], [], "", cure)


def gpu(patient: Patient) -> Finding:
    """PyTorch reaches the GPUs through their driver."""
    device = patient.parameters.device
    if device == "cpu":
        return not_checked("the profile trains on CPUs")
    faults: list[str] = []
    lines: list[str] = []
    well = set()
    for where, (names, why) in patient.where_it_trains(_gpus).items():
        if names:
            well.add(f"{len(names)} x {names[0]}")
        elif device == "cuda" or why:
            # The profile can do without: it trains there, slowly.
            (faults if device == "cuda" else lines).append(f"{where}: {why or 'no GPU'}")
        else:
            well.add("no GPU: it trains on CPUs")
    cure = (
        "install a driver as new as torch's CUDA wants, or a torch for an older CUDA "
        "(pytorch.org); in a container, start it with its GPUs (`--gpus all`); or train with "
        "`-p device cpu`"
    )
    return judge(faults, lines, ", ".join(sorted(well)), cure)


def _gpus() -> tuple[list[str], str]:
    """Names of the GPUs that are seen; and why there are none, if there is a driver for them."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return [torch.cuda.get_device_name(i) for i in range(count)], ""
    told = Path("/proc/driver/nvidia/version")
    if not told.exists():
        return [], ""
    if torch.version.cuda is None:
        return [], f"an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
    why = "; ".join(str(warning.message).split("(Triggered")[0].strip() for warning in said)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = why or (f"CUDA_VISIBLE_DEVICES is {shown!r}" if shown is not None else "it sees no GPU")
    return [], f"{told.read_text().splitlines()[0]}, torch for CUDA {torch.version.cuda}: {why}"


def shared_memory(patient: Patient) -> Finding:
    """/dev/shm has room for NCCL."""
    device = patient.parameters.device
    found: dict[str, Any] = {}
    if device != "cpu":
        asked = patient.where_it_trains(_shared_memory)
        found = {where: free for where, (free, gpus) in asked.items() if gpus or device == "cuda"}
    if not found:
        return not_checked("only NCCL needs it, and there are no GPUs")
    small = [
        f"{where}: {_size(free)} free in /dev/shm"
        for where, free in found.items()
        if free < LEAST_SHARED_MEMORY
    ]
    cure = "start the container with --shm-size=1g or --ipc=host: NCCL exchanges gradients there"
    return judge(small, [], f"{_size(min(found.values()))} free in /dev/shm", cure)


def _shared_memory() -> tuple[int, int]:
    import torch

    path = "/dev/shm"
    free = shutil.disk_usage(path).free if os.path.isdir(path) else 0
    return free, torch.cuda.device_count()


def bfloat16(patient: Patient) -> Finding:
    """The hardware computes in bfloat16, if the profile wants it."""
    from gan_lib.training.ranks import EMULATED

    p = patient.parameters
    if p.precision == "float32":
        return not_checked("the profile trains in float32")
    found = patient.where_it_trains(_speed, p.device)
    slow = [where for where, speed in found.items() if speed == "emulated"]
    if p.precision == "bfloat16" and slow:
        said, cure = EMULATED.split(". ", 1)
        return judge([], [f"{name_some(slow)}: {said}"], "", cure)
    speeds = set(found.values())
    takes = "bfloat16" if p.precision == "bfloat16" or speeds == {"faster"} else "float32"
    said = " or ".join(sorted(speeds))
    return ok(f"training in it is {said}: precision {p.precision} takes {takes}")


def _speed(device: str) -> str:
    from gan_lib.training.ranks import pick_device, speed_of_bfloat16

    return speed_of_bfloat16(pick_device(device))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.0f} MB"
