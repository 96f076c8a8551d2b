"""A sweep: the list of its runs, and what has become of them, as their directories tell.

sweep.json     what each run is told, written before the first one begins
NAME/          a run directory for each, named by its values
sweep.csv      a row for each
sweep.png      pictures of all that differ in two parameters
sweep.html     the same with sliders for the others, and the rows
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

import pandas as pd

from gan_lib.base.addresses import absolute
from gan_lib.base.checks import check_type
from gan_lib.base.errors import RunError, UserError, describe
from gan_lib.base.storage import Folder
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES, PARAMETERS
from gan_lib.results.grids import grid_of, run_name
from gan_lib.results.quality import of_network
from gan_lib.results.run import Run

LIST, TABLE = "sweep.json", "sweep.csv"


def write_list(
    url: str, parameters: TrainingParameters, runs: Mapping[str, Mapping[str, Any]], ranks: int
) -> Sweep:
    """Write down what a sweep is; the one that is there already must be the same.

    Raises:
        RunError: if another sweep lives there, or the place cannot be written.
    """
    folder = Folder(url)
    try:
        if not folder.exists(LIST):
            told = {"parameters": parameters.to_dict(), "ranks": ranks, "runs": runs}
            folder.write(LIST, json.dumps(told, indent=2).encode())
    except OSError as error:
        raise RunError(f"the sweep's folder {url} cannot be written: {error}") from error
    there = Sweep(url)
    was, now = there.parameters.to_dict(), parameters.to_dict()
    differences = [
        f"{name} was {was[name]!r} and is {now[name]!r}" for name in was if was[name] != now[name]
    ]
    if there.ranks != ranks:
        differences.append(f"a run had {there.ranks} ranks and is to have {ranks}")
    if there.runs != runs:
        a, b = (f"{len(which)} runs of {', '.join(grid_of(which))}" for which in (there.runs, runs))
        differences.append(f"it has {a}, and these are {b}" if a != b else "its values are others")
    if differences:
        raise RunError(
            f"{url} holds another sweep: {'; '.join(differences)}. Choose another folder, or "
            "repeat the call with which it began"
        )
    return there


class Sweep:
    """The folder of a sweep, read only, while it goes on or a year later.

    Anybody may have written it: what is not as it should be is a RunError.

    Attributes:
        url: where it lives.
        parameters: of all runs, but for what each is told.
        ranks: on which each run is trained.
        runs: name -> values, of each.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.folder = Folder(self.url)
        try:
            data = self.folder.read(LIST)
        except FileNotFoundError:
            raise RunError(f"no sweep lives at {url}: it holds no {LIST}") from None
        try:
            told = check_type("it", dict, json.loads(data))
            self.parameters = TrainingParameters.from_mapping(told["parameters"])
            self.ranks = check_type("ranks", int, told["ranks"])
            self.runs: dict[str, dict[str, Any]] = check_type("runs", dict, told["runs"])
            if not self.runs:
                raise ValueError("it has no run")
            for name, values in self.runs.items():
                self.parameters.replace(**values)
                if name != run_name(values):  # it becomes a path
                    raise ValueError(f"a run is called {name!r}")
        except Exception as error:
            raise RunError(f"{self.url}/{LIST} is damaged: {describe(error)}") from None

    def __repr__(self) -> str:
        return f"<Sweep {self.url}: {len(self.runs)} runs of {', '.join(grid_of(self.runs))}>"

    def told(self, name: str) -> TrainingParameters:
        """The parameters of a run."""
        return self.parameters.replace(**self.runs[name])

    def run_url(self, name: str) -> str:
        """Where a run lives, or will."""
        return f"{self.url}/{name}"

    def run(self, name: str) -> Run | None:
        """A run, or None if it has not been begun.

        Raises:
            RunError: if it is damaged.
        """
        if not self.folder.exists(f"{name}/{PARAMETERS}"):
            return None
        return Run(self.run_url(name))

    def state(self, name: str) -> tuple[str, str]:
        """What a run was last heard to do, as in `RunStatus`, or "new"; and why it ended.

        What cannot be read is "failed" if it is damaged, and otherwise "unknown".
        """
        try:
            run = self.run(name)
            status = run and run.status()
        except RunError as error:
            return "failed", describe(error)
        except OSError as error:
            return "unknown", describe(error)
        return (status.state, status.error or status.reason) if status else ("new", "")

    def table(self) -> pd.DataFrame:
        """A row for each run.

        It has "run" (its name); the values; "state"; "error", or why it ended early; "epochs" and
        "steps" that it has trained; the losses of its last record; "kid_best", "epoch_best",
        "kid_last"; "images_per_second" (median of its last epoch); and "minutes", which is what
        the steps take at that speed. What a run does not have is empty.
        """
        table = pd.DataFrame([self._row(name) for name in self.runs])
        # Whole numbers, of which some may be missing.
        return table.astype(dict.fromkeys(("epochs", "steps", "epoch_best"), "Int64"))

    def _row(self, name: str) -> dict[str, Any]:
        state, error = self.state(name)
        row: dict[str, Any] = {"run": name, **self.runs[name], "state": state}
        measured: dict[str, Any] = {}
        try:
            run = self.run(name)
            measured = {} if run is None else _measured(run, state)
        except (UserError, OSError) as damage:
            error = error or describe(damage)
        columns = ("epochs", "steps", *LOSSES, "kid_best", "epoch_best", "kid_last",
                   "images_per_second", "minutes")  # fmt: skip
        return row | {"error": error.partition("\n")[0]} | {c: measured.get(c) for c in columns}


def _measured(run: Run, state: str) -> dict[str, Any]:
    """The numbers of a row, as far as there are any."""
    found: dict[str, Any] = {}
    lines = of_network(run.quality())
    if lines:
        best = min(lines, key=lambda line: line["kid"])
        found |= {"kid_best": best["kid"], "epoch_best": best["epoch"]}
        found["kid_last"] = lines[-1]["kid"]
    records = run.plain_records(run.epochs("records")[-1:])
    if not records:
        return found
    last, info = records[-1], run.info()
    # A run that ended well has also done the steps after its last record.
    finished = state == "finished" and "steps_per_epoch" in info
    steps = last["epoch"] * info["steps_per_epoch"] if finished else last["iteration"]
    speed = statistics.median(record["images_per_second"] for record in records)
    found |= {"epochs": last["epoch"], "steps": steps, **{loss: last[loss] for loss in LOSSES}}
    minutes = round(steps * run.parameters.batch_size / speed / 60, 2) if speed else None
    return found | {"images_per_second": round(speed, 1), "minutes": minutes}
