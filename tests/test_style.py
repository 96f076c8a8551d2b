"""What a reader meets before the code runs: style, formatting, the lock, the manifest's home."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from gan_lib.base.checkout import CHECKOUT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True
    )


def test_ruff_finds_nothing() -> None:
    done = run("ruff", "check", ".")
    assert done.returncode == 0, done.stdout


def test_code_is_formatted() -> None:
    done = run("ruff", "format", "--check", ".")
    assert done.returncode == 0, done.stdout


def test_types_are_as_they_are_written(mypy: subprocess.Popen[str]) -> None:
    said = mypy.communicate()[0]
    assert mypy.returncode == 0, said


def test_public_things_have_docstrings_and_types() -> None:
    import ast

    for path in (CHECKOUT / "gan_lib").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                where = f"{path.name}: {node.name}"
                assert node.returns is not None, where
                own = [a for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
                assert all(a.annotation or a.arg == "cls" for a in own), where
    for path in (CHECKOUT / "gan_lib").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_lock_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(item for extra in extras for item in extra)]
    lock = (CHECKOUT / "requirements.lock").read_text()
    locked = set(re.findall(r"^([a-z0-9-]+)==", lock, flags=re.MULTILINE))
    assert {re.split(r"[<>=]", item)[0] for item in asked} <= locked
    # pip installs no file but those that `make lock` has seen.
    requirements = lock.replace("\\\n", "").splitlines()
    assert all("--hash=sha256:" in line for line in requirements if not line.startswith("#"))
    assert "--require-hashes $(FROM) -r $(LOCK)" in (CHECKOUT / "Makefile").read_text()
    assert "torch==2.14.1" in lock
    assert "torchvision==0.29.1" in lock


def test_conda_users_get_the_same() -> None:
    environment = yaml.safe_load((CHECKOUT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.lock"]} in environment["dependencies"]


def test_pre_commit_strips_notebooks() -> None:
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert {"nbstripout", "ruff-check", "ruff-format"} <= set(hooks)
    assert re.search(hooks["nbstripout"]["files"], "notebooks/01_data.ipynb")
    # The notebooks are as it and JupyterLab leave them: a commit changes only what somebody did.
    options = hooks["nbstripout"]["entry"].split()[1:]
    notebooks = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
    command = [sys.executable, "-m", "nbstripout", *options, "--verify", *notebooks]
    assert subprocess.run(command).returncode == 0
    for path in notebooks:
        text = path.read_text()
        assert nbformat.writes(nbformat.reads(text, as_version=4)) == text.removesuffix("\n"), path


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would do, in an environment that is not there yet."""
    command = ["make", "--dry-run", "--always-make", *words]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def test_a_room_is_installed_without_cuda_and_without_a_network(tmp_path: Path) -> None:
    # What is done is what is told, with the lock that is written on the way.
    (awk,) = [x for x in make("tutorial", "TORCH=cpu").stdout.splitlines() if x.startswith("awk")]
    script = awk.partition(" > ")[0]
    left = subprocess.run(script, shell=True, cwd=CHECKOUT, capture_output=True, text=True).stdout
    pins = re.findall(r"^([a-z0-9-]+)==", (CHECKOUT / "requirements.lock").read_text(), re.M)
    kept = re.findall(r"^([a-z0-9-]+)==", left, re.M)
    gone = {name for name in pins if name not in kept}
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13", "cuda-toolkit"} <= gone
    assert {name.partition("-")[0] for name in gone} == {"torch", "torchvision", "triton",
                                                         "nvidia", "cuda"}  # fmt: skip
    assert left.count("--hash=sha256:") >= len(kept)
    with_network = make("tutorial", "TORCH=cpu").stdout
    assert "-r constraints.txt --index-url https://download.pytorch.org/whl/cpu" in with_network
    (tmp_path / "one.whl").touch()
    without = make("tutorial", f"WHEELHOUSE={tmp_path}").stdout
    assert without.count(f"--no-index --find-links {tmp_path}") == 1
    assert "index-url" not in make("tutorial", f"WHEELHOUSE={tmp_path}", "TORCH=cpu").stdout
    assert "TORCH is cuda: it can be cpu" in make("tutorial", "TORCH=cuda").stderr
    assert "there are no wheels in nowhere" in make("tutorial", "WHEELHOUSE=nowhere").stderr


def test_a_container_is_told_in_json() -> None:
    told = json.loads((CHECKOUT / ".devcontainer" / "devcontainer.json").read_text())
    assert "make .venv/.ready TORCH=cpu" in told["postCreateCommand"]
    assert "make .venv/.ready TORCH=cpu" in (CHECKOUT / "binder" / "postBuild").read_text()


def test_make_lab_works_for_root() -> None:
    done = subprocess.run(["make", "-n", "lab"], cwd=CHECKOUT, capture_output=True, text=True)
    # Jupyter refuses root without it, and need not be told by anybody else.
    assert ("--allow-root" in done.stdout) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{page.name}" for page in (CHECKOUT / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(name: str) -> None:
    page = CHECKOUT / name
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert local
    for target in local:
        assert (page.parent / target).exists(), target


def test_pillow_opens_only_formats_that_are_named() -> None:
    for path in [*(CHECKOUT / "gan_lib").rglob("*.py"), *(CHECKOUT / "benchmarks").glob("*.py")]:
        for call in re.findall(r"Image\.open\(.*", path.read_text()):
            assert "formats=" in call, path


def test_the_package_offers_what_most_programs_need() -> None:
    import gan_lib

    for name in gan_lib.__all__:
        assert callable(getattr(gan_lib, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gan_lib.nothing  # noqa: B018
