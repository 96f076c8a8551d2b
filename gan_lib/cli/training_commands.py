"""python -m gan_lib train, resume, watch, stop, runs: one run from a shell, without a notebook."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gan_lib.base.addresses import absolute
from gan_lib.base.checks import check_type, refuse_unknown_names
from gan_lib.base.errors import RunError, UserError, describe
from gan_lib.base.interrupts import interruptible
from gan_lib.cli import profiles
from gan_lib.cli.arguments import add_example, add_parameters, add_profile, add_run
from gan_lib.parameters import TrainingParameters

if TYPE_CHECKING:
    from distributed import Client

    from gan_lib.jobs.job import Job
    from gan_lib.results.run import Run
    from gan_lib.results.summaries import Summary

CLUSTER = {"address": "", "n_workers": 0}
STATUSES = (
    "Exit status: 0 finished, or stopped because somebody asked for it; 1 failed; 2 a mistake in "
    "what was asked; 130 after Ctrl-C, 143 after SIGTERM, which end it after a step, with a "
    "checkpoint; a second one ends it at once."
)


def add_training(commands: Any) -> None:
    """Add the commands to `python -m gan_lib`."""
    one = commands.add_parser("train", help="train one run", description=STATUSES)
    add_profile(one)
    one.add_argument("--run", help="folder or URL that keeps it; default: a new one under runs/")
    add_example(one, "train --profile quick -p epochs 8 --run runs/first")
    one.set_defaults(do=_train)

    one = commands.add_parser("resume", help="go on with a run", description=STATUSES)
    add_run(one)
    add_parameters(one)
    one.add_argument(
        "--new-images", action="store_true", help="also if they are not those it was trained on"
    )
    add_example(one, "resume runs/first -p epochs 16 -p n_workers 1")
    one.set_defaults(do=_resume)

    one = commands.add_parser("watch", help="show how a run goes on, whoever trains it")
    add_run(one)
    add_example(one, "watch s3://bucket/runs/first")
    one.set_defaults(do=_watch)

    one = commands.add_parser("stop", help="ask a run to end after its epoch, with a checkpoint")
    add_run(one)
    one.add_argument("--now", action="store_true", help="within seconds, inside the epoch")
    add_example(one, "stop runs/first --now")
    one.set_defaults(do=_stop)

    one = commands.add_parser("runs", help="a table of runs, the newest first")
    one.add_argument("folder", nargs="?", help="of the runs, or its URL; default: runs/")
    add_example(one, "runs s3://bucket/runs")
    one.set_defaults(do=_runs)


def _train(options: argparse.Namespace) -> int:
    given = dict(options.parameter) | ({"run": options.run} if options.run else {})
    parameters, values = told(options.profile, given)
    # Only now: a mistake should not have to wait for torch to be imported.
    from gan_lib.jobs.launching import launch
    from gan_lib.results.writing import new_run_url, refuse_taken

    url = absolute(values["run"] or new_run_url())
    refuse_taken(url)
    with cluster_for(values["address"], values["n_workers"], parameters.device) as client:
        job = launch(client, parameters, url, values["n_workers"] or None)
        return follow(job, values["address"])


def told(
    profile: str, given: dict[str, str], look: bool = True
) -> tuple[TrainingParameters, dict[str, Any]]:
    """What a profile, and texts that are stronger, say of a training; and all that they say.

    Args:
        profile, given, look: as in `profiles.training_values`.

    Raises:
        UserError: as `profiles.training_values`.
    """
    values = profiles.training_values(profile, given, look)
    return TrainingParameters(**{n: values[n] for n in TrainingParameters.names()}), values


def _resume(options: argparse.Namespace) -> int:
    # Only now: whoever asks for help should not wait for torch.
    from gan_lib.results.checkpoints import Position
    from gan_lib.results.run import open_run
    from gan_lib.training.resuming import refuse_differences

    run = open_run(options.run)
    told = run.parameters.to_dict() | CLUSTER
    given = dict(options.parameter)
    refuse_unknown_names(given, told)
    changes = {
        name: check_type(name, type(told[name]), profiles.parse_value(name, text, told[name]))
        for name, text in given.items()
    }
    address, n_workers = (changes.pop(name, CLUSTER[name]) for name in CLUSTER)
    parameters = run.parameters.replace(**changes)
    refuse_differences(run.url, run.parameters, parameters)
    if run.positions()[-1:] == [Position(parameters.epochs)]:
        raise RunError(
            f"{run.url} has done all its {parameters.epochs} epochs: give it more, such as "
            f"-p epochs {2 * parameters.epochs}"
        )
    before = run.info().get("world_size", 0)
    with cluster_for(address, n_workers or (0 if address else before), parameters.device) as client:
        # Of a cluster that is shared no more than it had; there may be fewer by now.
        most = n_workers or min(before, len(client.nthreads())) or None
        job = run.resume(client, most, new_images=options.new_images, **changes)
        return follow(job, address)


@contextlib.contextmanager
def cluster_for(address: str, n_workers: int, device: str) -> Iterator[Client]:
    """A client of the cluster at an address, or of one on this machine that ends with the block.

    Args:
        address: of a scheduler; empty starts a cluster.
        n_workers: at least so many; 0 takes one per GPU or core, or those that there are.
        device: see `start_cluster`.

    Raises:
        ClusterError: as `connect` and `start_cluster`.
    """
    from gan_lib.cluster.starting import close_cluster, connect, start_cluster

    client = (
        connect(address, n_workers or 1) if address else start_cluster(n_workers or None, device)
    )
    try:
        yield client
    finally:
        close_cluster(client)


def follow(job: Job, address: str = "") -> int:
    """Show a job until it ends, and say how to go on with what has not been finished.

    The first Ctrl-C or SIGTERM has it keep a checkpoint and end; a second one leaves it at once.

    Args:
        job: on a cluster.
        address: of that cluster; empty if it ends with this process.

    Returns:
        The exit status, see `STATUSES`.

    Raises:
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM.
    """
    from gan_lib.results.watching import watch_run

    leave = threading.Event()
    asked = False

    def goes_on() -> bool:
        nonlocal asked
        if leave.is_set() and not asked:
            asked = True
            job.stop(now=True)
        return not job.done()

    print(f"run directory: {job.run.url}", flush=True)
    try:
        with interruptible(leave):
            watch_run(job.run, goes_on)
    finally:
        if not job.done():
            job.leave()
        _say_how_it_ended(job.run, address)
    error = job.error()
    if error is None:
        return 0
    if not isinstance(error, UserError):
        raise error
    print(f"error: {describe(error)}", file=sys.stderr)
    return 1


def _say_how_it_ended(run: Run, address: str = "") -> None:
    state, positions = run.status().state, run.positions()
    if state == "finished":
        print(f"finished: {run.url}")
        return
    kept = f"; the newest checkpoint is {positions[-1]}" if positions else ", without a checkpoint"
    print(f"{state}{kept}. To go on:\n  {command('resume', run.url, address)}", flush=True)


def command(name: str, url: str, address: str = "") -> str:
    """A line to copy into a shell."""
    where = ["-p", "address", address] if address else []
    return shlex.join([sys.executable, "-m", "gan_lib", name, url, *where])


def _watch(options: argparse.Namespace) -> int:
    from gan_lib.results.run import open_run

    run = open_run(options.run)
    run.watch()
    state = run.status().state
    if state in ("stopped", "failed", "interrupted"):
        _say_how_it_ended(run)
    return 1 if state in ("failed", "interrupted") else 0


def _stop(options: argparse.Namespace) -> int:
    from gan_lib.results.run import open_run
    from gan_lib.results.summaries import summarise

    run = open_run(options.run)
    state = summarise(run).state
    run.stop(options.now)
    if state == "silent":
        print(f"{run.url} has given no sign of life for a while: it may have ended already")
    elif state in ("waiting", "training"):
        when = "within seconds" if options.now else "after this epoch"
        print(f"{run.url} is asked to end {when}. To see it:\n  {command('watch', run.url)}")
    else:
        print(f"{run.url} does not train: it is {state}")
    return 0


def _runs(options: argparse.Namespace) -> int:
    from gan_lib.results import files
    from gan_lib.results.summaries import summaries

    found = summaries(options.folder or files.RUNS)
    head = ("run", "state", "epoch", "images/s", "quality", "last sign of life")
    print_table([head, *map(_line, found)])
    for summary in found:
        if summary.state in ("failed", "damaged"):
            print(f"{summary.name}: {summary.why}")
    return 0


def print_table(lines: Sequence[tuple[str, ...]]) -> None:
    """Print lines of equally many words in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def _line(run: Summary) -> tuple[str, ...]:
    speed = run.images_per_second
    return (
        run.name,
        run.state,
        f"{run.epoch}/{run.epochs}" if run.epochs else "",
        "" if speed is None else f"{speed:,.0f}",
        run.quality,
        _ago(time.time() - run.seen) if run.seen else "",
    )


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} seconds ago"
