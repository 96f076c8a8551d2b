"""What `make wheelhouse` has written is all that a room without a network needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gan_lib.base.checkout import CHECKOUT

WHEELHOUSE = CHECKOUT / "wheelhouse"
# The command that runs the rest of its line where there is no network but loopback.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def made_here(folder: str, names: list[str]) -> set[str]:
    """What lies in a checkout that was not there when it was fetched."""
    ours = {".git", ".venv", "wheelhouse", "runs", "executed"}
    return ours if folder == str(CHECKOUT) else {"__pycache__"}


@pytest.mark.long
def test_the_series_is_installed_and_executed_without_a_network(tmp_path: Path) -> None:
    if not any(WHEELHOUSE.glob("torch-*.whl")):
        pytest.skip("needs 3 GB of wheels in wheelhouse/: make wheelhouse")
    if (cannot := subprocess.run([*ALONE, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no network namespace here, which needs root: {cannot.stderr.strip()}")
    room, home = tmp_path / "room", tmp_path / "home"
    shutil.copytree(CHECKOUT, room, ignore=made_here)
    home.mkdir()
    # Nothing of this user's: no cache, no package index nearby, no environment.
    told = {"HOME": str(home), "PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull}
    make = ["make", "tutorial", f"PYTHON={sys.executable}", f"WHEELHOUSE={WHEELHOUSE}"]
    done = subprocess.run(
        [*ALONE, *make, "PROFILE=tiny --core"],
        cwd=room, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    shutil.rmtree(room / ".venv", ignore_errors=True)  # 6 GB
    assert done.returncode == 0, done.stdout[-3000:]
    (index,) = room.rglob("index.html")
    assert len(list(index.parent.glob("*.ipynb"))) == 5
