"""Ctrl-C and SIGTERM while `python -m gan_lib run` executes notebooks."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import RunError
from gan_lib.results.run import open_run

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def interrupt(folder: Path, number: int, notebook: str, until: Callable[[], bool]) -> Path:
    """Send a signal to a run of a notebook once `until` says so; its executed notebook.

    Afterwards no process of it is left.
    """
    command = ["-m", "gan_lib", "run", notebook, "--core", "--profile", "tiny"]
    options = ["--out", str(folder / "out")]
    if notebook == "04":
        options += ["-p", "run", str(folder / "run"), "-p", "epochs", "100000"]
        options += ["-p", "keep_checkpoints", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *options], cwd=CHECKOUT, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while not until() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        status = process.wait(timeout=90)
    said = (folder / "log").read_text()
    assert status == STATUS[number], said
    assert "what was done is kept" in said
    # Dask's workers may log that they have lost each other: that is no error of ours.
    assert f'File "{CHECKOUT}/gan_lib' not in said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    return next((folder / "out").glob("*.ipynb"), folder / "none")


@pytest.mark.long
@pytest.mark.parametrize("number", list(STATUS), ids=lambda number: number.name)
def test_interrupted_while_it_trains(tmp_path: Path, number: int) -> None:
    def trains() -> bool:
        return any((tmp_path / "run" / "checkpoints").glob("*.pt"))

    path = interrupt(tmp_path, number, "04", trains)
    run = open_run(str(tmp_path / "run"))
    assert run.status().state in ("stopped", "interrupted")
    assert run.checkpoint()["iteration"] > 0
    assert not list((tmp_path / "run").rglob("*.part"))
    outputs = [c.get("outputs") for c in nbformat.read(path, as_version=4).cells]
    assert sum(map(bool, outputs)) > 10
    assert path.with_suffix(".html").exists()


def test_sigterm_ends_it_as_ctrl_c_does(tmp_path: Path) -> None:
    kept = tmp_path / "out" / "02_models.ipynb"

    def executes() -> bool:
        return kept.exists() and '"execution_count": 2' in kept.read_text()

    assert interrupt(tmp_path, signal.SIGTERM, "02", executes) == kept
    nbformat.validate(nbformat.read(kept, as_version=4))
    assert kept.with_suffix(".html").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_interrupted_at_any_moment(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    number = rng.choice(list(STATUS))
    moment = time.monotonic() + rng.uniform(2, 40)
    # Not before Python has come to where it can answer.
    path = interrupt(tmp_path, number, "04", lambda: time.monotonic() > moment)
    for place in tmp_path.glob("run*"):
        try:
            assert open_run(str(place)).status().state in ("finished", "stopped", "interrupted")
        except RunError:
            assert not list(place.rglob("*"))  # nothing was begun there
    if path.exists():
        nbformat.validate(nbformat.read(path, as_version=4))
