"""The notebooks in JupyterLab, as `make lab` opens it, in a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from ipykernel.ipkernel import IPythonKernel
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Page, sync_playwright

from gan_lib.base.checkout import CHECKOUT
from gan_lib.cli.profiles import (
    FOLDER,
    notebook_names,
    notebook_parameters,
    read_profile,
    series_values,
)
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training.rank import train_gan

NAMES = notebook_names()
NOTEBOOK = "jupyterapp.shell.currentWidget"
# What the notebook holds: its code cells, as they are in its file.
CELLS = f"{NOTEBOOK}.content.model.toJSON().cells.filter(cell => cell.cell_type === 'code')"
MINUTES = 60_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where JupyterLab finds its notebooks."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(tiny: TrainingParameters, folder: Path) -> Iterator[str]:
    """A JupyterLab over notebooks that were told the tiny profile; its address."""
    shutil.copytree(CHECKOUT / "docs", folder / "docs")
    (folder / "notebooks").mkdir()
    shutil.copy(FOLDER / "plain_ddp.py", folder / "notebooks")
    told = series_values(NAMES, read_profile("tiny") | {"run": str(folder / "run")}, {})
    train_gan(tiny, run=told["run"], progress=False)  # for notebook 05 to read
    for name in NAMES:
        notebook = load_notebook_node(str(FOLDER / f"{name}.ipynb"))
        mine = {k: v for k, v in told.items() if k in notebook_parameters(name)}
        notebook = parameterize_notebook(notebook, mine)
        # Else JupyterLab writes into each notebook which Python has opened it.
        notebook.metadata["language_info"] = IPythonKernel.language_info
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    cell = nbformat.v4.new_code_cell(
        f"from gan_lib.results import open_run\nopen_run({str(folder / 'endless')!r}).watch()"
    )
    metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    watching = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
    nbformat.write(watching, folder / "notebooks" / "watching.ipynb")
    settings = folder / "settings"
    settings.mkdir()
    shutil.copy(CHECKOUT / ".jupyter" / "overrides.json", settings)
    shutil.copytree(CHECKOUT / ".jupyter" / "workspaces", folder / "workspaces")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--IdentityProvider.token=", f"--notebook-dir={folder}", "--expose-app-in-browser",
        f"--LabApp.app_settings_dir={settings}", f"--LabApp.workspaces_dir={folder}/workspaces",
    ]  # fmt: skip
    # Pictures and bars as a reader has them, and not the lines of a log.
    environment = {k: v for k, v in os.environ.items() if k != "GAN_LIB_HEADLESS"}
    environment |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "HOME": str(folder)}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as server,
    ):
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)  # for its kernels, which end with it in any case
            server.kill()


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(2 * MINUTES)
        yield page
        browser.close()


def open_notebook(page: Page, lab: str, name: str) -> None:
    page.goto(f"{lab}/lab/workspaces/series/tree/notebooks/{name}.ipynb")
    # The workspace may show another first, which was open before.
    shown = f"{NOTEBOOK}?.content?.widgets && {NOTEBOOK}.title.label === '{name}.ipynb'"
    page.wait_for_function(f"window.jupyterapp && {shown}")
    page.wait_for_function(f"{NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'")


def scroll_to(page: Page, words: str) -> None:
    """Bring the cell with these words into sight; what is out of sight is not drawn."""
    source = "cell.model.sharedModel.source"
    cell = f"{NOTEBOOK}.content.widgets.findIndex(cell => {source}.includes('{words}'))"
    page.evaluate(f"void {NOTEBOOK}.content.scrollToItem({cell})")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_without_a_question(name: str, lab: str, page: Page) -> None:
    open_notebook(page, lab, name)
    page.locator(".jp-TableOfContents").wait_for()
    assert page.locator(".jp-Dialog, .jp-Notification-Toast").count() == 0
    assert page.evaluate(f"{NOTEBOOK}.sessionContext.kernelDisplayName") == "Python 3 (ipykernel)"
    assert not page.evaluate(f"{NOTEBOOK}.context.model.dirty")  # nothing is to be saved
    # Answers are hidden, and open with a click.
    scroll_to(page, "## Three questions")
    # Others stay open in tabs behind it.
    shown = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    question = shown.locator("details", has_text="1.").first
    answer = question.locator("p").first
    assert not answer.is_visible()
    question.locator("summary").click()
    assert answer.is_visible()


@pytest.mark.long
def test_a_notebook_runs_to_its_end_and_its_sliders_move(lab: str, page: Page) -> None:
    open_notebook(page, lab, "05_results")
    page.evaluate("void jupyterapp.commands.execute('runmenu:run-all')")
    page.wait_for_function(f"{CELLS}.every(cell => cell.execution_count)", timeout=8 * MINUTES)
    outputs = [output for cell in page.evaluate(CELLS) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    for theme in ("Dark", "Light"):
        page.evaluate(
            "theme => void jupyterapp.commands.execute('apputils:change-theme', {theme})",
            f"JupyterLab {theme}",
        )
        page.wait_for_function(f"document.body.dataset.jpThemeName === 'JupyterLab {theme}'")
        scroll_to(page, "epoch=pictures")
        slider = page.locator(".jp-OutputArea", has=page.locator(".noUi-handle")).first
        slider.wait_for()
        before = slider.locator("img").get_attribute("src")
        slider.locator(".noUi-handle").press("ArrowRight" if theme == "Dark" else "ArrowLeft")
        page.wait_for_function(
            "before => ![...document.images].some(image => image.src === before)", arg=before
        )
        assert slider.locator("img").count() == 1  # in the place of the other, not below it


@pytest.mark.long
def test_a_live_picture_is_redrawn_in_its_place(
    lab: str, page: Page, folder: Path, tiny: TrainingParameters
) -> None:
    endless = str(folder / "endless")
    told = {"parameters": tiny.replace(epochs=1_000_000), "run": endless, "progress": False}
    training = threading.Thread(target=train_gan, kwargs=told)
    training.start()
    try:
        while not (folder / "endless" / "parameters.json").exists():
            time.sleep(0.1)
        open_notebook(page, lab, "watching")
        page.evaluate("void jupyterapp.commands.execute('runmenu:run-all')")
        pictures = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea img")
        seen = set()
        for _ in range(3):
            pictures.first.wait_for()
            seen.add(pictures.first.get_attribute("src"))
            page.wait_for_function(
                "seen => ![...document.images].some(image => seen.includes(image.src))",
                arg=list(seen),
            )
            pictures.first.wait_for()
            assert pictures.count() == 1
        assert len(seen) == 3
    finally:
        open_run(endless).stop(now=True)
        training.join()
    page.wait_for_function(f"{CELLS}.every(cell => cell.execution_count)")
    assert pictures.count() == 1
    assert not [o for cell in page.evaluate(CELLS) for o in cell["outputs"]
                if o["output_type"] == "error"]  # fmt: skip
