"""What the notebooks say of their runs, compared with what the runs say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from gan_lib.cli.notebooks import run_notebooks
from gan_lib.cli.profiles import read_profile, series_values


def tables(path: Path) -> str:
    """All that the cells of an executed notebook show as text, among it their tables."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("data", {}).get("text/plain", o.get("text", "")) for o in outputs)


def row(text: str, name: str) -> list[float]:
    """The numbers of the last row of a table that begins with `name`."""
    found = re.findall(rf"^{re.escape(name)}  +([-\d. naN]+)$", text, flags=re.MULTILINE)
    assert found, f"no row {name!r} in {text}"
    return [float(number) for number in found[-1].split()]


@pytest.mark.long
def test_the_failures_of_notebook_03_are_failures(tmp_path: Path) -> None:
    values = series_values(["03_parameters"], read_profile("quick"), {})
    done = run_notebooks(["03_parameters"], values, "claims", str(tmp_path), core=True)
    said = tables(done.folder / "03_parameters.ipynb")
    kid, variety, _ = row(said, "default")
    fast = row(said, "learning rates x 10")
    assert fast[0] < kid - 1  # no failure: a short run rewards haste
    assert "no longer finite" in said or row(said, "learning rates x 1000")[1] < 0.01
    assert row(said, "discriminator x 10")[1] < variety / 2
    assert row(said, "discriminator / 100")[1] < 0.15
    assert row(said, "the generator alone")[1] < 0.5 * row(said, "both learn")[1]
    assert row(said, "the generator alone")[0] > 2 * row(said, "both learn")[0]
    first, last = map(
        float, re.search(r"loss_g: ([\d.]+) at first, ([\d.]+) in the end", said).groups()
    )
    assert last < 0.1 * first
    # In the step of the spike, the fourth of seven, images of both kinds are rejected.
    spike = re.search(
        r"real  generated  loss_d_real  loss_d_fake\s+iteration\s+(?:.+\n){3}\d+ +(.+)", said
    )
    scores = [float(number) for number in spike[1].split()[:2]]
    assert max(scores) < -1.5
    # Against label 0.5 the generator's loss is lower, and the discriminator as sure as ever.
    loss, generated, real, rejected = row(said, "real_label = 0.5")
    loss_1, generated_1, real_1, rejected_1 = row(said, "real_label = 1.0")
    assert loss < 0.65 * loss_1
    assert generated == pytest.approx(generated_1, abs=1)
    assert real_1 - real > 2
    assert rejected > rejected_1
