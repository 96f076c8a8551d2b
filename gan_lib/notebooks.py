"""Runs the notebooks headlessly: papermill, with what it does not check.

papermill only warns of a parameter that a notebook does not have. Here every
name, type and value is checked, the images are looked for and the cluster is
called before the first cell runs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from gan_lib.errors import ParameterError, RunError, UserError
from gan_lib.images import check_source, resolve_source
from gan_lib.parameters import TrainingParameters, check_type, refuse_unknown_names
from gan_lib.progress import HEADLESS_VARIABLE, SECONDS_BETWEEN_LINES, parse_progress
from gan_lib.results import RUNS, open_run

CHECKOUT = Path(__file__).parents[1]
FOLDER = CHECKOUT / "notebooks"
PROFILES = CHECKOUT / "profiles"
EXECUTED = CHECKOUT / "executed"
# The endings of the pictures that a cell can show.
PICTURES = {"image/png": ".png", "image/gif": ".gif"}


class NotebookError(UserError):
    """A cell of a notebook failed; the executed notebook is kept."""


@dataclass(frozen=True)
class Executed:
    """What an execution of the series leaves.

    Attributes:
        folder: of the executed notebooks, an HTML of each, and `pictures/`.
        run: URL of the run directory that notebook 04 wrote and 05 read, if they were run.
    """

    folder: Path
    run: str | None


def notebook_names() -> list[str]:
    """The names of the series' notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def notebook_parameters(name: str) -> dict[str, Any]:
    """Parameter -> default of one notebook: what its cell tagged `parameters` assigns.

    Raises:
        ParameterError: if there is no such cell, or it holds anything but plain values.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"notebook {name} has {len(cells)} cells tagged parameters, not 1")
    defaults = {}
    for statement in ast.parse(cells[0].source).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ParameterError(
                f"the parameters cell of notebook {name} holds {ast.unparse(statement)!r}: "
                "only `name = value` belongs there"
            )
        defaults[statement.targets[0].id] = ast.literal_eval(statement.value)
    return defaults


def read_profile(name: str) -> dict[str, Any]:
    """Parameters from a YAML file, or from the profile of that name in `profiles/`.

    Raises:
        ParameterError: if there is no such file, or it is not a mapping.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ParameterError(
            f"there is no profile {name!r}: give the path of a YAML file, or one of {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"the profile {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParameterError(f"the profile {path} holds no `name: value` lines")
    return values


def parse_override(text: str, default: Any) -> Any:
    """A value from the command line: text where text is wanted, otherwise YAML."""
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        # YAML reads 1e-4 as text.
        with contextlib.suppress(ValueError):
            return float(text)
    return yaml.safe_load(text)


def check_parameters(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values for these notebooks, without running anything.

    Returns:
        The values, of the types that the notebooks expect.

    Raises:
        UserError: that names the parameter, the value and the cure.
    """
    defaults: dict[str, Any] = {}
    for name in names:
        defaults |= notebook_parameters(name)
    refuse_unknown_names(values, defaults)
    checked = {name: check_type(name, type(defaults[name]), v) for name, v in values.items()}
    together = defaults | checked
    training = {k: v for k, v in together.items() if k in TrainingParameters.names()}
    TrainingParameters.from_mapping(training)
    if together.get("n_workers", 0) < 0:
        raise ParameterError(
            f"n_workers is {together['n_workers']}, expected 1 or more (0: one per GPU or core)"
        )
    if together.get("short_epochs", 1) < 1:
        raise ParameterError(f"short_epochs is {together['short_epochs']}, expected 1 or more")
    if "source" in together:
        check_source(together["source"])
        if "source" in checked:
            checked["source"] = resolve_source(checked["source"])
    if together.get("address"):
        # Not at the top: it takes seconds to import, and most runs need no cluster here.
        from gan_lib.cluster import connect

        connect(together["address"]).close()
    return checked


def run_notebooks(
    names: Sequence[str] | None = None,
    profile: str = "quick",
    overrides: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> Executed:
    """Execute notebooks with a profile; keep each executed one, also when a cell fails.

    Args:
        names: which, in order; None means the whole series. "04" is enough for a name.
        profile: name in `profiles/`, or path of a YAML file.
        overrides: parameter -> text from the command line; stronger than the profile.
        folder: for the executed notebooks; None makes one under `executed/`.

    Raises:
        NotebookError: if a cell fails.
        UserError: if something is wrong that can be known before.
    """
    chosen = [_full_name(name) for name in names] if names else notebook_names()
    values = _values(chosen, read_profile(profile), overrides or {})
    label = f"{Path(profile).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = _place_of_run(chosen, values, label)
    if run is not None:
        values["run"] = run
    target = Path(folder).resolve() if folder else EXECUTED / label
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    total = sum(len(nbformat.read(FOLDER / f"{n}.ipynb", as_version=4).cells) for n in chosen)
    with _headless(), _SeriesProgress(total) as progress:
        for name in chosen:
            progress.begin(name)
            own = notebook_parameters(name)
            try:
                _execute(name, {k: v for k, v in values.items() if k in own}, target, progress)
            finally:
                _export(target / f"{name}.ipynb")
    return Executed(target, run)


def _full_name(name: str) -> str:
    stem = Path(name).stem
    found = [known for known in notebook_names() if known == stem or known.startswith(f"{stem}_")]
    if not found:
        raise ParameterError(
            f"there is no notebook {name!r}: the series has {', '.join(notebook_names())}"
        )
    return found[0]


def _values(
    names: Sequence[str], profile: Mapping[str, Any], overrides: Mapping[str, str]
) -> dict[str, Any]:
    """Profile and overrides, checked, for these notebooks."""
    series: dict[str, Any] = {}
    for name in notebook_names():
        series |= notebook_parameters(name)
    own: dict[str, Any] = {}
    for name in names:
        own |= notebook_parameters(name)
    # A profile speaks to the whole series, an override to what is run now.
    refuse_unknown_names(profile, series)
    refuse_unknown_names(overrides, own)
    values = {name: value for name, value in profile.items() if name in own}
    values |= {name: parse_override(text, own[name]) for name, text in overrides.items()}
    return check_parameters(names, values)


def _place_of_run(names: Sequence[str], values: Mapping[str, Any], label: str) -> str | None:
    """The run directory: notebook 04 writes a new one, 05 alone reads an existing one."""
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
    name: str, parameters: dict[str, Any], folder: Path, progress: _SeriesProgress
) -> None:
    target = folder / f"{name}.ipynb"
    try:
        papermill.execute_notebook(
            FOLDER / f"{name}.ipynb",
            target,
            parameters,
            engine_name="gan_lib",
            kernel_name="python3",
            progress_bar=False,
            cwd=FOLDER,
            stdout_file=progress,
            on_cell=progress.cell_done,
        )
    except PapermillExecutionError as error:
        first_line = next((line for line in error.source.splitlines() if line.strip()), "")
        raise NotebookError(
            f"{name}, cell {error.exec_count} (`{first_line}`) failed with "
            f"{error.ename}: {error.evalue}\nThe executed notebook is kept: {target}"
        ) from None


class _WatchedEngine(NBClientEngine):
    """papermill's own engine, which also says when a cell is done."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, on_cell: Callable[[], None], **options: Any
    ) -> None:
        complete = nb_man.cell_complete

        def complete_and_tell(*arguments: Any, **keywords: Any) -> None:
            complete(*arguments, **keywords)
            on_cell()

        nb_man.cell_complete = complete_and_tell
        super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("gan_lib", _WatchedEngine)


class _SeriesProgress:
    """A bar for the cells of the series, and below it one for what a cell is doing.

    It is also the file that papermill writes the notebooks' output to: the lines
    of a headless `ProgressBar` become the second bar. Where no person looks, both
    are lines now and then.
    """

    def __init__(self, n_cells: int) -> None:
        self._live = sys.stderr.isatty()
        self._cells = tqdm(total=n_cells, unit="cell", disable=not self._live, position=0)
        self._inner = tqdm(unit="step", disable=not self._live, position=1, leave=False)
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

    def write(self, text: str) -> None:
        for line in text.splitlines():
            state = parse_progress(line)
            if state is None:
                continue
            if self._live:
                self._inner.set_description(state.description)
                self._inner.total, self._inner.n = state.total, state.done
                self._inner.unit = state.unit
                self._inner.set_postfix_str(state.text)
            elif time.monotonic() - self._printed_at > 2 * SECONDS_BETWEEN_LINES:
                self._printed_at = time.monotonic()
                print(f"  {line.strip()}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing is held back."""

    def _end_notebook(self) -> None:
        if self._name:
            seconds = time.monotonic() - self._started
            tqdm.write(f"{self._name} done in {seconds:.0f} s", file=sys.stderr)

    def __enter__(self) -> _SeriesProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._inner.close()
        self._cells.close()
        if kind is None:
            self._end_notebook()


def _export(path: Path) -> None:
    """Next to an executed notebook: an HTML of it, and its pictures."""
    if not path.exists():
        return
    notebook = nbformat.read(path, as_version=4)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    path.with_suffix(".html").write_text(html, encoding="utf-8")
    for i, (ending, data) in enumerate(_pictures(notebook), start=1):
        (path.parent / "pictures" / f"{path.stem}-{i:02d}{ending}").write_bytes(data)


def _pictures(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, bytes]]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind, ending in PICTURES.items():
                if kind in output.get("data", {}):
                    yield ending, base64.b64decode(output["data"][kind])


@contextlib.contextmanager
def _headless() -> Iterator[None]:
    """Kernels that are started inside print progress as lines."""
    before = os.environ.get(HEADLESS_VARIABLE)
    os.environ[HEADLESS_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[HEADLESS_VARIABLE]
        else:
            os.environ[HEADLESS_VARIABLE] = before
