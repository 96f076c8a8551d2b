"""The house: rooms that import only downward, each small, each with a question at its door."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gan_lib.base.checkout import CHECKOUT

PACKAGE = CHECKOUT / "gan_lib"
# From the top.
ROOMS = [
    "cli", "doctor", "jobs", "training", "results", "quality", "gan", "practice", "data", "cluster",
    "sources", "parameters", "base",
]  # fmt: skip
# What a user calls on a run, and reaches what is above it only when it is called.
REACHES_UP = {("gan_lib.results.run", f"gan_lib.{name}")
              for name in ("jobs.job", "jobs.launching", "results.measuring",
                           "results.watching")}  # fmt: skip


def modules() -> dict[str, Path]:
    """Name -> file, of all but the doors of the rooms, which import only when they are asked."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(CHECKOUT).with_suffix("").parts): path for path in files}


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of gan_lib that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        yield from (m for m in found if m in known and (name, m) not in REACHES_UP)


def room(module: str) -> str:
    return module.split(".")[1]


def test_rooms_import_only_downward() -> None:
    known = modules()
    assert {room(name) for name in known} == {*ROOMS, "__main__"}
    for name, path in known.items():
        for other in imports(name, path, known):
            if room(name) in ROOMS:
                assert ROOMS.index(room(name)) <= ROOMS.index(room(other)), f"{name}: {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    waiting = {name: set(imports(name, path, known)) - {name} for name, path in known.items()}
    # Whatever imports nothing that is still there can be taken away.
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting


def test_each_file_can_be_read_at_one_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path


@pytest.mark.parametrize("name", [name for name in ROOMS if name != "parameters"])
def test_each_room_says_which_question_it_answers(name: str) -> None:
    door = importlib.import_module(f"gan_lib.{name}")
    assert door.__doc__ is not None
    assert door.__doc__.splitlines()[0].endswith("?")
    assert 2 <= len(door.__all__) <= 5
    told = ast.parse((PACKAGE / name / "__init__.py").read_text())
    # What editors read, and what Python does.
    shown = {alias.asname for n in ast.walk(told) if isinstance(n, ast.ImportFrom)
             for alias in n.names if alias.asname}  # fmt: skip
    assert shown == set(door.__all__) == set(dir(door))
    assert all(getattr(door, each) for each in door.__all__)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("gan_lib.parameters", ["torch", "dask", "numpy"]),
        ("gan_lib.gan.steps", ["dask", "distributed", "obstore", "botocore", "matplotlib"]),
        ("gan_lib.gan.models", ["dask", "distributed", "obstore", "botocore", "matplotlib"]),
        ("gan_lib.quality.scores", ["dask", "distributed", "obstore", "botocore", "matplotlib"]),
        ("gan_lib.cli.profiles", ["torch"]),
    ],
)
def test_what_is_asked_for_loads_no_more_than_it_needs(module: str, without: list[str]) -> None:
    code = f"import sys, {module}; print(*(sys.modules.keys() & {set(without)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
