"""python -m gan_lib sweep: many runs side by side on one cluster, and what has become of them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml

from gan_lib.base.checks import refuse_unknown_names
from gan_lib.base.errors import ParameterError
from gan_lib.cli import profiles
from gan_lib.cli.arguments import add_example, add_profile
from gan_lib.cli.training_commands import cluster_for, told
from gan_lib.parameters import TrainingParameters
from gan_lib.results.grids import list_runs


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Give `python -m gan_lib sweep` its arguments."""
    parser.description = (
        "Trains a run for every combination of the values, each on workers of its own, as many at "
        "a time as there are workers for. Ctrl-C has each keep a checkpoint; the same command goes "
        "on. Exit status: 0 all runs have finished; 1 some have not; 2 a mistake in what was "
        "asked; 130 after Ctrl-C, 143 after SIGTERM."
    )
    parser.add_argument(
        "-s",
        "--sweep",
        action="append",
        required=True,
        metavar="NAME=VALUE,VALUE",
        help="a parameter and its values, which may also be a YAML list; may be given again",
    )
    add_profile(parser)
    parser.add_argument("--ranks", type=int, default=1, help="workers of each run; default: 1")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--zip", action="store_true", help="first values together, then second ones")
    which.add_argument(
        "--random", type=int, default=0, metavar="N", help="only N combinations, always the same"
    )
    parser.add_argument("--retry-failed", action="store_true", help="go on with failed runs, too")
    parser.add_argument(
        "--stop-worst",
        type=int,
        default=0,
        metavar="N",
        help="after each measurement only the best 1/N of the runs go on (2: the better half)",
    )
    parser.add_argument("--out", required=True, help="folder or URL for the runs and their table")
    add_example(parser, "sweep --profile quick -s lr_g=1e-4,2e-4 -s seed=0,1,2 --out runs/rates")
    parser.set_defaults(do=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    given = dict(options.parameter)
    if "run" in given:
        raise ParameterError(f"run is {given['run']!r}: the runs of a sweep lie below --out")
    grid = read_grid(options.sweep)
    # The profile's number of workers is that of one run elsewhere: no cluster is asked for it.
    parameters, values = told(options.profile, given, look=False)
    runs = list_runs(parameters, grid, options.zip, options.random)
    # Only now: a mistake should not have to wait for torch to be imported.
    from gan_lib.jobs.sweeping import check_sweep, sweep

    check_sweep(parameters, runs, options.out, options.ranks, options.stop_worst)
    address, ranks = values["address"], options.ranks
    n_workers = ranks if address else values["n_workers"] and max(values["n_workers"], ranks)
    with cluster_for(address, n_workers, parameters.device) as client:
        done = sweep(
            client,
            parameters,
            grid,
            options.out,
            ranks,
            options.zip,
            options.random,
            options.retry_failed,
            options.stop_worst,
        )
    table = done.table()
    left = table[table["state"] != "finished"]
    for name, state, error in left[["run", "state", "error"]].itertuples(index=False):
        print(f"{name}: {state}" + (f": {error}" if error else ""), file=sys.stderr)
    print(f"{len(table) - len(left)} of {len(table)} runs have finished: {done.url}")
    print("sweep.csv is the table, sweep.png and sweep.html show what they draw")
    return 1 if len(left) else 0


def read_grid(texts: list[str]) -> dict[str, list[Any]]:
    """Parameter -> values, of `NAME=VALUE,VALUE` or `NAME=[VALUE, VALUE]`, each of its type.

    Raises:
        ParameterError: if it is neither, or the name is unknown or given twice.
    """
    grid: dict[str, list[Any]] = {}
    known = TrainingParameters().to_dict()
    for text in texts:
        name, equals, after = text.partition("=")
        if not equals:
            raise ParameterError(f"-s is {text!r}, expected NAME=VALUE,VALUE, such as seed=0,1,2")
        refuse_unknown_names([name], known)
        if name in grid:
            raise ParameterError(f"-s names {name} twice: give all its values at once")
        try:
            # Values may hold a comma themselves, and are then a YAML list.
            values = yaml.safe_load(after) if after.startswith("[") else after.split(",")
            grid[name] = [profiles.parse_value(name, f"{value}", known[name]) for value in values]
        except yaml.YAMLError:
            raise ParameterError(f"-s is {text!r}, which is no YAML list") from None
    return grid
