"""`python -m gan_lib run` with several profiles: each series in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import yaml

from gan_lib.__main__ import main
from gan_lib.base.checkout import CHECKOUT
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.results.writing import create_run
from gan_lib.training.rank import train_gan


def write_profile(path: Path, **values: Any) -> list[str]:
    """A profile as the command line takes it."""
    path.write_text(yaml.safe_dump(values))
    return ["--profile", str(path)]


def test_several_profiles_are_all_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = write_profile(tmp_path / "wrong.yaml", batch_size=-1)
    twice = [
        *write_profile(tmp_path / "one.yaml", run=str(tmp_path / "run")),
        *write_profile(tmp_path / "two.yaml", run=str(tmp_path / "run")),
    ]
    for words, sentence in (
        (["--profile", "tiny"], "the profiles are tiny, tiny: give each name once"),
        (["--profile", "nope"], "there is no profile 'nope'"),
        (wrong, "batch_size is -1"),
        (twice, "2 of the profiles name the run"),
        (["--profile", "quick", "-p", "run", "x"], "run is 'x', and there are 2 profiles"),
        (["--profile", "quick", "-p", "lrg", "1"], "no parameter 'lrg': did you mean 'lr_g'"),
    ):
        out = ["--out", str(tmp_path / "out")]
        assert main(["run", "--profile", "tiny", *words, *out]) == 2
        said = capsys.readouterr()
        assert sentence in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_at_a_time_and_one_that_fails(
    tmp_path: Path, tiny: TrainingParameters, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for name in ("a", "b", "none"):
        place = str(tmp_path / "runs" / name)
        if name == "none":
            create_run(place, tiny)
        else:
            p = tiny.replace(epochs=2, quality_every=1, quality_images=48, seed=len(told))
            train_gan(p, run=place, progress=False)
        told += write_profile(tmp_path / f"{name}.yaml", run=place)
    out = tmp_path / "out"
    # Notebook 05 needs no workers: a core for each.
    assert main(["run", "05", "--core", *told, "--out", str(out)]) == 1
    said = capsys.readouterr()
    for name in ("a", "b"):
        best = min(open_run(str(tmp_path / "runs" / name)).quality(), key=lambda line: line["kid"])
        quality = rf"KID {best['kid']:.4f} \(epoch {best['epoch']}\)"
        row = rf"{name} +finished +\d+\.\d +{quality}  {out}/{name}"
        assert re.search(row, said.out), said.out
        assert (out / name / "index.html").exists()
    assert re.search(rf"none +failed +\d+\.\d +{out}/none", said.out), said.out
    assert re.search(r"^none: 05_results, cell .* there is too little in", said.err, re.MULTILINE)
    assert "there is too little in" in (out / "none.log").read_text()
    books = [nbformat.read(out / name / "05_results.ipynb", as_version=4) for name in ("a", "b")]
    times = [(book.metadata.papermill.start_time, book.metadata.papermill.end_time)
             for book in books]  # fmt: skip
    if len(os.sched_getaffinity(0)) > 1:
        assert max(start for start, _ in times) < min(end for _, end in times)


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_ctrl_c_ends_all_and_begins_no_other(tmp_path: Path, number: int) -> None:
    told: list[str] = []
    for name in ("a", "b", "c"):
        values = {"image_size": 16, "channels": 1, "max_images": 96, "n_workers": 1}
        told += write_profile(tmp_path / f"{name}.yaml", **values)
    command = [sys.executable, "-m", "gan_lib", "run", "02", "04", *told]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--core", "--out", str(tmp_path / "out")],
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
        )
        books = [tmp_path / "out" / name / "02_models.ipynb" for name in ("a", "b")]
        while not all(b.exists() and '"execution_count": 2' in b.read_text() for b in books):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        status = process.wait(timeout=100)
    said = (tmp_path / "log").read_text()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert re.findall(r"^(\w+) +(interrupted|not begun)", said, re.MULTILINE) == [
        ("a", "interrupted"), ("b", "interrupted"), ("c", "not begun"),
    ]  # fmt: skip
    for book in books:
        nbformat.validate(nbformat.read(book, as_version=4))
        assert book.with_suffix(".html").exists()
