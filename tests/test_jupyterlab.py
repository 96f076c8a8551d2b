"""The notebooks in JupyterLab, as `make lab` opens it, in a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
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

NAMES = notebook_names()
NOTEBOOK = "jupyterapp.shell.currentWidget"
# What the notebook holds: its code cells, as they are in its file.
CELLS = f"{NOTEBOOK}.content.model.toJSON().cells.filter(cell => cell.cell_type === 'code')"
MINUTES = 60_000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab over notebooks that were told the tiny profile; its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(CHECKOUT / "docs", folder / "docs")
    (folder / "notebooks").mkdir()
    shutil.copy(FOLDER / "plain_ddp.py", folder / "notebooks")
    told = series_values(NAMES, read_profile("tiny") | {"run": str(folder / "run")}, {})
    for name in NAMES:
        notebook = load_notebook_node(str(FOLDER / f"{name}.ipynb"))
        mine = {k: v for k, v in told.items() if k in notebook_parameters(name)}
        notebook = parameterize_notebook(notebook, mine)
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
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


def call(page: Page, command: str, arguments: str = "{}") -> None:
    page.evaluate(f"void jupyterapp.commands.execute('{command}', {arguments})")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_opened_read_and_run(name: str, lab: str, page: Page, tmp_path: Path) -> None:
    page.goto(f"{lab}/lab/workspaces/series/tree/notebooks/{name}.ipynb")
    page.wait_for_function(f"window.jupyterapp && {NOTEBOOK} && {NOTEBOOK}.content.widgets")
    page.wait_for_function(f"{NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'")
    # No question and no news; the right kernel; the table of contents beside it.
    page.locator(".jp-TableOfContents").wait_for()
    assert page.locator(".jp-Dialog, .jp-Notification-Toast").count() == 0
    assert page.evaluate(f"{NOTEBOOK}.sessionContext.kernelDisplayName") == "Python 3 (ipykernel)"

    # Answers are hidden, and open with a click.
    source = "cell.model.sharedModel.source"
    place = f"widgets.findIndex(cell => {source}.startsWith('## Three questions'))"
    page.evaluate(f"void {NOTEBOOK}.content.scrollToItem({NOTEBOOK}.content.{place})")
    question = page.locator("details", has_text="1.").first
    question.scroll_into_view_if_needed()
    answer = question.locator("p").first
    assert not answer.is_visible()
    question.locator("summary").click()
    assert answer.is_visible()

    call(page, "runmenu:run-all")
    page.wait_for_function(
        f"{CELLS}.every(cell => cell.execution_count) && "
        f"{NOTEBOOK}.sessionContext.session.kernel.status === 'idle'",
        timeout=5 * MINUTES,
    )
    cells = page.evaluate(CELLS)
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    for cell in cells:
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        # Also where it is drawn anew while the training goes on, or a slider is moved.
        assert len(pictures) <= 1
        assert ("watch()" in cell["source"]) <= (len(pictures) == 1)

    for theme in ("Light", "Dark"):
        call(page, "apputils:change-theme", f"{{theme: 'JupyterLab {theme}'}}")
        page.wait_for_function(f"document.body.dataset.jpThemeName === 'JupyterLab {theme}'")
        for i, picture in enumerate(page.locator(".jp-RenderedImage img").all()[:3]):
            # A figure brings its own white; letters on a dark page would not be seen.
            picture.scroll_into_view_if_needed()
            page.screenshot(path=tmp_path / f"{name}-{theme}-{i}.png")
    call(page, "apputils:change-theme", "{theme: 'JupyterLab Light'}")
    page.evaluate(f"{NOTEBOOK}.context.save()")


@pytest.mark.long
def test_a_slider_moves_and_the_figure_with_it(lab: str, page: Page) -> None:
    """After the tests above: notebook 05 has been run, and is open."""
    assert "05_results" in page.evaluate(f"{NOTEBOOK}.context.path")
    slider = page.locator(".jupyter-widgets .noUi-handle").first
    slider.scroll_into_view_if_needed()
    picture = page.locator(".jp-OutputArea", has=slider).locator("img").first
    before = picture.get_attribute("src")
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_function(
        "before => ![...document.images].some(image => image.src === before)", arg=before
    )
    assert picture.is_visible()
