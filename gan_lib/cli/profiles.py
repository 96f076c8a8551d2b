"""What the notebooks may be told: their parameters, the profiles, and the checks of both.

papermill only warns of a parameter that a notebook does not have. Here every
name, type and value is checked, the images are looked for and the cluster is
called, before the first cell runs and without importing torch.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.checks import check_type, refuse_unknown_names
from gan_lib.base.errors import ParameterError
from gan_lib.data.checking import check_source
from gan_lib.parameters import TrainingParameters
from gan_lib.sources.source import resolve_source

FOLDER = CHECKOUT / "notebooks"
PROFILES = CHECKOUT / "profiles"
# The notebook that trains: with the same profile, a shell trains the same run.
TRAINING = "04_distributed_training"


def notebook_names() -> list[str]:
    """The names of the series' notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def notebook_parameters(name: str) -> dict[str, Any]:
    """Parameter -> default of one notebook: what its cell tagged `parameters` assigns.

    Raises:
        ParameterError: if there is no such cell, or it holds anything but plain values.
    """
    defaults = {}
    for statement in ast.parse(_parameters_cell(name)).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ParameterError(
                f"the parameters cell of notebook {name} holds {ast.unparse(statement)!r}: "
                "only `name = value` belongs there"
            )
        defaults[statement.targets[0].id] = ast.literal_eval(statement.value)
    return defaults


def parameter_table() -> str:
    """Every parameter that a profile or `-p` may set: notebooks, name, default, what it is."""
    lines: dict[str, tuple[str, list[str]]] = {}
    # The fourth first: it has nearly all, in the order of TrainingParameters.
    for notebook in sorted(notebook_names(), key=lambda name: not name.startswith("04")):
        for line in _parameters_cell(notebook).splitlines():
            name, _, told = line.partition(" = ")
            lines.setdefault(name, (told, []))[1].append(notebook[:2])
    rows = [("notebooks", "parameter = default  # what it is")]
    rows += [(" ".join(sorted(where)), f"{name} = {told}") for name, (told, where) in lines.items()]
    return "\n".join(f"{where:<15} {text}" for where, text in rows)


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


def check_parameters(
    names: Sequence[str], values: Mapping[str, Any], look: bool = True
) -> dict[str, Any]:
    """Check values for these notebooks, without running anything.

    Args:
        names: full names of the notebooks.
        values: by parameter.
        look: also look for the images, and call the cluster.

    Returns:
        The values, of the types that the notebooks expect.

    Raises:
        UserError: that names the parameter, the value and the cure.
    """
    defaults = _defaults(names)
    refuse_unknown_names(values, defaults)
    checked = {name: check_type(name, type(defaults[name]), v) for name, v in values.items()}
    # What is empty unless it is given says nothing: the run that is read, and its source.
    together = {k: v for k, v in defaults.items() if v != ""} | checked
    training = {k: v for k, v in together.items() if k in TrainingParameters.names()}
    TrainingParameters.from_mapping(training)
    if together.get("n_workers", 0) < 0:
        raise ParameterError(
            f"n_workers is {together['n_workers']}, expected 1 or more (0: one per GPU or core)"
        )
    if together.get("short_steps", 4) < 4:
        raise ParameterError(f"short_steps is {together['short_steps']}, expected 4 or more")
    if look and "source" in together:
        check_source(together["source"])
    if "source" in checked:
        checked["source"] = resolve_source(checked["source"])
    if look and together.get("address"):
        # Not at the top: it takes seconds to import, and most runs need no cluster here.
        from gan_lib.cluster.starting import connect, scheduler_at

        # A notebook is run in another folder, where a path to a scheduler file leads elsewhere.
        together["address"] = scheduler_at(together["address"])
        if "address" in checked:
            checked["address"] = together["address"]
        connect(together["address"], checked.get("n_workers") or 1).close()
    return checked


def full_names(names: Sequence[str]) -> list[str]:
    """The notebooks that were asked for, such as "04" or "05_results"; none means all.

    Raises:
        ParameterError: if there is none of that name.
    """
    known = notebook_names()
    found = []
    for name in names:
        stem = Path(name).stem
        fitting = [k for k in known if k == stem or k.startswith(f"{stem}_")]
        if not fitting:
            raise ParameterError(f"there is no notebook {name!r}: there are {', '.join(known)}")
        found.append(fitting[0])
    return found or known


def series_values(
    names: Sequence[str],
    profile: Mapping[str, Any],
    overrides: Mapping[str, str],
    look: bool = True,
) -> dict[str, Any]:
    """Profile and overrides, checked, for these notebooks.

    Args:
        names: full names of the notebooks.
        profile: speaks to the whole series.
        overrides: parameter -> text from the command line; speaks to these
            notebooks, and is stronger.
        look: as in `check_parameters`.

    Raises:
        UserError: that names the parameter, the value and the cure.
    """
    series = _defaults(notebook_names())
    own = _defaults(names)
    refuse_unknown_names(profile, series)
    refuse_unknown_names(overrides, own)
    # Where a run is only read, it is the run that was told a source.
    values = {k: v for k, v in profile.items() if k in own and (k != "source" or own[k])}
    values |= {name: parse_value(name, text, own[name]) for name, text in overrides.items()}
    return check_parameters(names, values, look)


def training_values(
    profile: str, overrides: Mapping[str, str], look: bool = True
) -> dict[str, Any]:
    """All that a training is told: by its notebook, a profile, and overrides, each stronger.

    Args:
        profile: a name, or a YAML file.
        overrides: as in `series_values`.
        look: as in `check_parameters`.

    Raises:
        UserError: as `series_values`.
    """
    values = series_values([TRAINING], read_profile(profile), overrides, look)
    return notebook_parameters(TRAINING) | values


def _parameters_cell(name: str) -> str:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"notebook {name} has {len(cells)} cells tagged parameters, not 1")
    return "".join(cells[0]["source"])


def _defaults(names: Sequence[str]) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for name in names:
        together = notebook_parameters(name) | together
    return together


def parse_value(name: str, text: str, default: Any) -> Any:
    """A parameter's value from the command line: text where text is wanted, otherwise YAML.

    Raises:
        ParameterError: if it is no YAML.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        # YAML reads 1e-4 as text.
        with contextlib.suppress(ValueError):
            return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ParameterError(
            f"{name} is {text!r}, which is no YAML: expected a value such as {default!r}"
        ) from None
