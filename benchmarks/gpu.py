"""Prove the GPU path on a machine with a GPU, with or without a network: `make gpu`.

    python benchmarks/gpu.py [--wheels FOLDER] [--source IMAGES] [--epochs 20]

Takes the Python that it is called with, and the torch and torchvision in it (2.11 and newer);
the other packages come from a folder of wheels, or are there already. Runs the tests marked
`gpu`, `benchmarks/step.py`, and some minutes of training at 64 x 64; writes all of it, and what
README may then say, into gpu-report.md. Any step that fails ends it, with what it said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
REPORT = CHECKOUT / "gpu-report.md"
# torch and torchvision are those of the machine: no other version is put in their place.
KEPT = ("torch", "torchvision", "nvidia", "triton", "cuda")

TRAINING = """
import sys
from gan_lib.training.rank import train_gan
source, size = sys.argv[1], 64
p = {"source": source, "image_size": size, "channels": int(sys.argv[2]), "batch_size": 64,
     "crop": "squash", "precision": "auto", "real_label": 0.9, "lr_d": 4e-4,
     "ema_images": 20000, "epochs": int(sys.argv[3]), "record_every": 20, "checkpoint_every": 1000}
result = train_gan(p, run="runs/gpu", progress=False)
last = result.records[-1]
print(f"{result.images_per_second:,.0f} images/s on {result.device}, with at most "
      f"{last.get('device_memory_gb', 0):.2f} GB of its memory; samples in runs/gpu/samples")
"""


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
    """What requirements.lock asks for beside torch, from a folder of wheels alone."""
    lock = (CHECKOUT / "requirements.lock").read_text()
    wanted = [line.split(" ;")[0].rstrip(" \\") for line in lock.splitlines() if "==" in line]
    wanted = [each.strip() for each in wanted if not each.strip().startswith((*KEPT, "#", "--"))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", wheels, *wanted], check=True)
    editable = ["--no-build-isolation", "--editable", str(CHECKOUT)]
    subprocess.run([*pip, *editable], check=True)


def step(title: str, *command: str) -> None:
    """Run it; what it said goes into the report."""
    print(f"{title} ...", flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=CHECKOUT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with REPORT.open("a") as report:
        report.write(f"\n## {title}\n\n```\n{done.stdout.strip()}\n```\n")
    if done.returncode:
        sys.exit(f"{done.stdout}\n{title} failed: see above, and {REPORT}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", default="", help="a folder of wheels to install from")
    parser.add_argument("--source", default="", help="images; without, the embedded silhouettes")
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    told = parser.parse_args()
    missing = what_is_missing()
    if missing:
        sys.exit(missing)
    import torch

    if told.wheels:
        install(told.wheels)
    name = torch.cuda.get_device_name()
    REPORT.write_text(
        f"# {name}, torch {torch.__version__}\n\n"
        f"README may say, once all below has passed: the GPU path was run on one {name}, with the "
        "images/s of the tables below.\n"
    )
    step("Tests", "-m", "pytest", "tests", "-m", "gpu", "-q")
    step("The step", "benchmarks/step.py", "--batch", "64", "256", "--picture", "runs/gpu.png")
    colour = "3" if told.source else "1"
    source = told.source or "dog-silhouettes"
    step("A training at 64 x 64", "-c", TRAINING, source, colour, str(told.epochs))
    print(f"all passed: {REPORT}")


if __name__ == "__main__":
    main()
