"""Which runs a sweep has: combinations of values, each with a name made of them."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gan_lib.base.checks import refuse_unknown_names, require_range
from gan_lib.base.errors import ParameterError
from gan_lib.parameters import TrainingParameters

# Characters of a run's name that no file system and no shell takes for something else.
_PLAIN = re.compile(r"[^\w.=+-]", re.ASCII)
_LONGEST_NAME = 120


def list_runs(
    parameters: TrainingParameters,
    grid: Mapping[str, Sequence[Any]],
    paired: bool = False,
    sample: int = 0,
) -> dict[str, dict[str, Any]]:
    """Name -> values, of each run of a sweep.

    Args:
        parameters: of all runs.
        grid: parameter -> the values that it takes; every combination of them is a run.
        paired: combine only the first values of all with each other, the second ones, and so on.
        sample: take so many of the combinations, drawn at random and the same every time; 0
            takes all.

    Raises:
        ParameterError: if one of the runs could not be trained.
    """
    refuse_unknown_names(grid, TrainingParameters.names())
    if not grid:
        raise ParameterError("a sweep has no parameter to vary: give it one, such as lr_g")
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ParameterError(f"{name} is {values!r}, expected a list of values to compare")
    lengths = {name: len(values) for name, values in grid.items()}
    if paired and len(set(lengths.values())) > 1:
        many = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ParameterError(f"values that go together must be equally many, and {many}")
    rows = list(zip(*grid.values(), strict=True) if paired else itertools.product(*grid.values()))
    if sample:
        require_range("the number of runs drawn at random", sample, 1, len(rows))
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), sample))]
    runs: dict[str, dict[str, Any]] = {}
    for row in rows:
        checked = parameters.replace(**dict(zip(grid, row, strict=True))).to_dict()
        run = {name: checked[name] for name in grid}
        called = run_name(run)
        if called in runs:
            raise ParameterError(f"a sweep has {called} twice: give each value once")
        runs[called] = run
    return runs


def run_name(values: Mapping[str, Any]) -> str:
    """What the run of these values is called, such as lr_g=0.0001_seed=0."""
    told = "_".join(f"{name}={value}" for name, value in values.items())
    plain = _PLAIN.sub("-", told)
    if plain == told and len(told) <= _LONGEST_NAME:
        return told
    return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def grid_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Parameter -> the values that it takes in these runs, in the order of the list."""
    names = next(iter(runs.values()))
    return {n: list(dict.fromkeys(values[n] for values in runs.values())) for n in names}
