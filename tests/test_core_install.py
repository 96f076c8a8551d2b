"""The core dependencies alone, without extras, import and train: a worker needs no more."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gan_lib.base.checkout import CHECKOUT

# Under its main guard: a worker imports it.
TRAIN = """
import importlib, pkgutil, sys

import gan_lib

if __name__ == "__main__":
    of_notebooks = ("__main__", "cli.pages", "cli.notebooks", "cli.series")
    for module in pkgutil.walk_packages(gan_lib.__path__, "gan_lib."):
        if module.name.removeprefix("gan_lib.") not in of_notebooks:
            importlib.import_module(module.name)
    told = {"image_size": 16, "channels": 1, "max_images": 64, "nz": 16, "ngf": 8, "ndf": 8,
            "batch_size": 32, "epochs": 1, "device": "cpu"}
    print(gan_lib.train_gan(told, run=f"{sys.argv[1]}/alone").epochs)
    client = gan_lib.start_cluster(1, device="cpu")
    job = gan_lib.launch(client, told, run=f"{sys.argv[1]}/on-a-cluster")
    job.watch()
    print(job.status)
    gan_lib.close_cluster(client)
    for name in ("IPython", "nbformat", "papermill", "pytest"):
        assert importlib.util.find_spec(name) is None, name
"""


def site_with(folder: Path, requirements: Iterable[str]) -> Path:
    """A folder in which Python finds these distributions, those that they need, and no others."""
    site = folder / "site-packages"
    site.mkdir()
    for name in _with_theirs(requirements):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return site


def _with_theirs(requirements: Iterable[str]) -> set[str]:
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        for extra in {"", *wanted.extras} - {e for name, e in found if name == wanted.name}:
            found.add((wanted.name, extra))
            for one in map(Requirement, importlib.metadata.requires(wanted.name) or []):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    waiting.append(one)
    return {name for name, _ in found}


@pytest.fixture
def core_only(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that find nothing installed but these."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    site = site_with(tmp_path, project["dependencies"])
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{CHECKOUT}", "PYTHONSAFEPATH": "1"}


def test_core_dependencies_are_enough_to_train(core_only: dict[str, str], tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        # Without the environment's own site-packages; workers are started in the same way.
        done = subprocess.run(
            [sys.executable, "-S", *arguments], env=core_only, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "dog-silhouettes" in run("-m", "gan_lib", "data", "list")
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    said = run(script, tmp_path).splitlines()
    assert "1" in said
    assert said[-1] == "finished"
