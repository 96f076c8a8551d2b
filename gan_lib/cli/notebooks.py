"""Runs the notebooks headlessly, by papermill: with progress, and keeping what was executed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill
from jupyter_core.utils import ensure_async, run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger
from tqdm import tqdm

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import NotebookError, ParameterError, RunError
from gan_lib.base.interrupts import interruptible
from gan_lib.base.progress import HEADLESS_VARIABLE, NOTE, SECONDS_BETWEEN_LINES, parse_progress
from gan_lib.cli import profiles
from gan_lib.cli.pages import export_notebook, write_index
from gan_lib.cli.profiles import notebook_parameters
from gan_lib.results.files import RUNS
from gan_lib.results.run import open_run

EXECUTED = CHECKOUT / "executed"
# How long a kernel may take to end: what it has launched stops with a checkpoint first.
SECONDS_TO_END = 40.0
# When a cell that still runs is interrupted again: a kernel between two cells does not hear it.
SECONDS_TO_INTERRUPT = 10.0


@dataclass(frozen=True)
class Executed:
    """What an execution of the series leaves.

    Attributes:
        folder: of the executed notebooks, an HTML of each, `index.html` and `pictures/`.
        run: URL of the run directory that notebook 04 wrote and 05 read, if they were run.
    """

    folder: Path
    run: str | None


def run_notebooks(
    names: Sequence[str],
    values: Mapping[str, Any],
    label: str,
    folder: str | None = None,
    core: bool = False,
) -> Executed:
    """Execute notebooks in order; keep each executed one, also when a cell fails.

    The first Ctrl-C or SIGTERM interrupts the cell that runs and ends the kernel in peace, a
    second one at once.

    Args:
        names: full names of the notebooks.
        values: parameters, as `profiles.series_values` has checked them; each
            notebook is given those that it has.
        label: begins the names of the folders that are made.
        folder: for the executed notebooks; None makes one under `executed/`.
        core: leave out what a reader may leave out, the cells tagged `aside`.

    Raises:
        NotebookError: if a cell fails.
        UserError: if the run directory is taken, or there is none to read.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM.
    """
    label = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = place_of_run(names, values, label)
    if run is not None:
        values = {**values, "run": run}
    target = Path(folder).resolve() if folder else EXECUTED / label
    make_folder(target / "pictures")
    books = {name: read_notebook(name, core) for name in names}
    # papermill adds a cell with the parameters to each.
    total = sum(len(book.cells) + 1 for book in books.values())
    stop = _Stop()
    # Kernels that are started inside print progress as lines.
    headless = patch.dict(os.environ, {HEADLESS_VARIABLE: "1"})
    with interruptible(stop), headless, _SeriesProgress(total) as progress:
        for name, book in books.items():
            if stop.is_set():
                break
            progress.begin(name)
            own = notebook_parameters(name)
            told = {k: v for k, v in values.items() if k in own}
            try:
                _execute(name, book, told, target, progress, stop)
            finally:
                export_notebook(target / f"{name}.ipynb", names)
                write_index(target, names, run)
    return Executed(target, run)


def make_folder(path: Path) -> None:
    """Make a folder for executed notebooks, if it is not there.

    Raises:
        ParameterError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"{path} cannot be made: {error.strerror}") from None


def read_notebook(name: str, core: bool = False) -> nbformat.NotebookNode:
    """A notebook of the series as it is stored, or its core: without the cells tagged `aside`."""
    book: nbformat.NotebookNode = nbformat.read(profiles.FOLDER / f"{name}.ipynb", as_version=4)
    if core:
        book.cells = [c for c in book.cells if "aside" not in c.metadata.get("tags", [])]
    return book


def place_of_run(names: Sequence[str], values: Mapping[str, Any], label: str) -> str | None:
    """The run directory: notebook 04 writes a new one, 05 alone reads an existing one.

    Raises:
        UserError: if it is taken, or there is none to read.
    """
    with_run = [own for own in map(notebook_parameters, names) if "run" in own]
    writes = any("epochs" in own for own in with_run)
    given = values.get("run", "")
    if given and "://" not in given:
        given = str(Path(given).expanduser().resolve())
    if writes:
        if given:
            with contextlib.suppress(RunError):
                open_run(given)
                raise ParameterError(f"run is {given!r}, where a run lives: name a new place")
        return given or f"{RUNS}/{label}"
    if with_run:
        return open_run(given or "latest").url
    return None


def _execute(
    name: str,
    book: nbformat.NotebookNode,
    parameters: dict[str, Any],
    folder: Path,
    progress: _SeriesProgress,
    stop: _Stop,
) -> None:
    target = folder / f"{name}.ipynb"
    try:
        papermill.execute_notebook(
            book,
            target,
            parameters,
            engine_name="gan_lib",
            kernel_name="python3",
            progress_bar=False,
            cwd=profiles.FOLDER,
            stdout_file=progress,
            on_cell=progress.cell_done,
            stop=stop,
            # Otherwise each kernel warns that it talks to us unencrypted, over loopback, and now
            # and then calls it an error that it is interrupted before it is shut down.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except (KeyboardInterrupt, PapermillExecutionError) as error:
        if stop.is_set():
            progress.interrupted()
            return
        if isinstance(error, KeyboardInterrupt):
            raise
        first_line = next((line for line in error.source.splitlines() if line.strip()), "")
        raise NotebookError(
            f"{name}, cell {error.exec_count} (`{first_line}`) failed with "
            f"{error.ename}: {error.evalue}\nThe executed notebook is kept: {target}"
        ) from None


class _Stop(threading.Event):
    """Set by a signal: the cell that runs is interrupted, and no other one begins."""

    # The process of the kernel while a cell runs in it.
    kernel: int | None = None

    def set(self) -> None:
        """Called where a signal arrives, between any two instructions of the main thread."""
        super().set()
        self._interrupt()

    def _interrupt(self) -> None:
        if self.kernel is None:
            return
        with contextlib.suppress(ProcessLookupError):
            # The kernel alone: its workers end when it has stopped what they do.
            os.kill(self.kernel, signal.SIGINT)
        again = threading.Timer(SECONDS_TO_INTERRUPT, self._interrupt)
        again.daemon = True
        again.start()


class _Client(PapermillNotebookClient):  # type: ignore[misc]  # papermill ships no types
    """papermill's own, which also says when a cell is done, and can be stopped."""

    def __init__(self, nb_man: Any, on_cell: Callable[[], None], stop: _Stop, **options: Any):
        super().__init__(nb_man, **options)
        self._on_cell, self._stop, self._at_once = on_cell, stop, False

    def execute_cell(self, *arguments: Any, **options: Any) -> Any:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.kernel = self.km.provisioner.pid
        try:
            return super().execute_cell(*arguments, **options)
        except (KeyboardInterrupt, SystemExit):  # the second signal
            self._at_once = True
            raise
        finally:
            self._stop.kernel = None
            self._on_cell()

    async def _async_cleanup_kernel(self) -> None:
        if self._stop.is_set() and not self._at_once and self.kc is not None:
            # A kernel that is told to shut down kills its children first: the workers, before what
            # they train has been stopped. One that ends by itself comes to that.
            self.kc.execute("get_ipython().ask_exit()", silent=True)
            deadline = time.monotonic() + SECONDS_TO_END
            while await ensure_async(self.km.is_alive()) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        await super()._async_cleanup_kernel()

    _cleanup_kernel = run_sync(_async_cleanup_kernel)


class _WatchedEngine(Engine):  # type: ignore[misc]  # papermill ships no types
    """papermill's own engine, with our client."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        names = ("on_cell", "stop", "stdout_file", "extra_arguments")
        own = {name: options[name] for name in names}
        _Client(nb_man, kernel_name=kernel_name, log=logger, **own).execute()


papermill_engines.register("gan_lib", _WatchedEngine)


# Without times: those of the bar's own making would be wrong, the text has the rate.
_BUSY = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_IDLE = "{desc}"


class _SeriesProgress(io.TextIOBase):
    """A bar for the cells of the series, and below it one for what a cell is doing.

    It is also the file that papermill writes the notebooks' output to: the lines
    of a headless `ProgressBar` become the second bar. Where no person looks, both
    are lines now and then.
    """

    def __init__(self, n_cells: int) -> None:
        self._live = sys.stderr.isatty()
        self._cells = tqdm(total=n_cells, unit="cell", disable=not self._live, position=0)
        self._inner = tqdm(
            total=1, disable=not self._live, position=1, leave=False, bar_format=_IDLE
        )
        self._name = ""
        self._printed_at = 0.0
        self._started = time.monotonic()

    def begin(self, name: str) -> None:
        self._end_notebook()
        self._name, self._started = name, time.monotonic()
        self._cells.set_description(name)
        if not self._live:
            print(f"{name} ...", file=sys.stderr, flush=True)

    def cell_done(self) -> None:
        self._cells.update(1)
        # What the cell was doing is done.
        self._inner.bar_format = _IDLE
        self._inner.set_description_str("")

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.startswith(NOTE):
                tqdm.write(f"  {line}", file=sys.stderr)
            state = parse_progress(line)
            if state is None:
                continue
            if self._live:
                self._inner.bar_format = _BUSY
                self._inner.set_description(state.description)
                self._inner.total, self._inner.n = state.total, state.done
                self._inner.set_postfix_str(state.text)
            elif time.monotonic() - self._printed_at > 2 * SECONDS_BETWEEN_LINES:
                self._printed_at = time.monotonic()
                print(f"  {line.strip()}", file=sys.stderr, flush=True)
        return len(text)

    def _end_notebook(self) -> None:
        if self._name:
            seconds = time.monotonic() - self._started
            tqdm.write(f"{self._name} done in {seconds:.0f} s", file=sys.stderr)

    def interrupted(self) -> None:
        """The notebook that runs ends without having been done."""
        self._name = ""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._inner.close()
        self._cells.close()
        if kind is None:
            self._end_notebook()
