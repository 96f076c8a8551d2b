"""python -m gan_lib: run the notebooks without opening them; train and measure runs; data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gan_lib.base.errors import NotebookError, UserError
from gan_lib.base.interrupts import interruptible

try:
    from gan_lib.base.progress import HEADLESS_VARIABLE
    from gan_lib.cli import profiles
    from gan_lib.cli.arguments import PROFILE_HELP, add_example, add_parameters
    from gan_lib.cli.data_commands import add_commands
    from gan_lib.cli.doctor_command import add_doctor
    from gan_lib.cli.generator_commands import add_generator
    from gan_lib.cli.measure_command import add_measure
    from gan_lib.cli.sweep_command import add_sweep
    from gan_lib.cli.training_commands import add_training
except ImportError as error:
    # What is half installed cannot say so itself.
    sys.exit(
        f"error: {sys.executable} cannot import {error.name or error}: it is not the Python of "
        "this project's environment, or installing that was interrupted. `make tutorial` installs; "
        "then it is .venv/bin/python -m gan_lib"
    )


@interruptible()
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a notebook failed, 2 for a mistake in what was asked.

    After Ctrl-C it is 130, after SIGTERM 143.
    """
    parser = argparse.ArgumentParser(prog="python -m gan_lib", description=__doc__)
    add_example(parser, "train --help")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the series, or some of its notebooks")
    run.add_argument("notebooks", nargs="*", help="such as 04 or 05_results; none means all")
    run.add_argument(
        "--profile",
        action="append",
        help=f"{PROFILE_HELP}; given again, the series of each is executed, side by side where "
        "there are workers for it; default: quick",
    )
    add_parameters(run)
    run.add_argument(
        "--parameters", action="store_true", help="only list what a profile and -p may set"
    )
    run.add_argument(
        "--core", action="store_true", help="leave out the asides: what two hours have time for"
    )
    run.add_argument("--out", help="folder for the executed notebooks; default: a new one")
    add_example(run, "run 04 05 --profile quick -p epochs 8")
    run.set_defaults(do=_run)
    add_commands(commands.add_parser("data", help="list, fetch, verify and prepare images"))
    add_training(commands)
    add_sweep(commands.add_parser("sweep", help="train many runs side by side, and compare them"))
    add_doctor(commands.add_parser("doctor", help="what works here, what not, how to mend it"))
    add_generator(commands)
    add_measure(commands.add_parser("measure", help="how good a run's pictures are, by epoch"))
    options = parser.parse_args(arguments)
    if not sys.stdout.isatty():
        os.environ.setdefault(HEADLESS_VARIABLE, "1")

    try:
        code: int = options.do(options)
        return code
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        print("interrupted; what was done is kept, and nothing half done is left", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 143


def _run(options: argparse.Namespace) -> int:
    if options.parameters:
        print(profiles.parameter_table())
        return 0
    names, overrides = profiles.full_names(options.notebooks), dict(options.parameter)
    first, *others = options.profile or ["quick"]
    if others:
        from gan_lib.cli.series import run_profiles

        return run_profiles(names, [first, *others], overrides, options.out, options.core)
    values = profiles.series_values(names, profiles.read_profile(first), overrides)
    # Only now: a mistake should not have to wait for torch to be imported.
    from gan_lib.cli.notebooks import run_notebooks

    label = Path(first).stem
    done = run_notebooks(names, values, label, options.out, options.core)
    print(f"executed notebooks, to be read in a browser: {done.folder / 'index.html'}")
    print(f"pictures:                                    {done.folder / 'pictures'}")
    if done.run is not None:
        print(f"run directory:                               {done.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
