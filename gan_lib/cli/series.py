"""Several profiles at once: the series of each in a process of its own, on places of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from dask.system import CPU_COUNT

from gan_lib.base.errors import ParameterError, UserError
from gan_lib.base.interrupts import interruptible
from gan_lib.base.progress import ProgressBar
from gan_lib.cli import profiles
from gan_lib.cli.notebooks import EXECUTED, make_folder, place_of_run
from gan_lib.cli.training_commands import print_table
from gan_lib.cluster.starting import close_cluster, connect
from gan_lib.results.run import open_run
from gan_lib.results.summaries import summarise

SECONDS_BETWEEN_LOOKS = 0.2
# What an interrupted series may take to keep a checkpoint and to end its kernel and its workers.
SECONDS_TO_END = 90.0
SECONDS_TO_READ = 5.0


@dataclass
class Series:
    """The notebooks with one profile: what is executed, and what has become of it.

    Attributes:
        label: name of the profile.
        command: that executes it.
        folder: of the executed notebooks; beside it LABEL.log has what the command says.
        run: URL of the run directory; None if the notebooks have none.
        address: of the scheduler that it uses; empty if it starts a cluster here.
        n_workers: how many places it takes; 0 takes all.
    """

    label: str
    command: list[str]
    folder: Path
    run: str | None
    address: str
    n_workers: int
    state: str = "not begun"
    error: str = ""
    seconds: float = 0.0
    notebook: str = ""
    done: int = 0
    places: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    listener: threading.Thread | None = None

    def start(self, places: list[str]) -> None:
        """Execute it on these cores or GPUs, or as many workers of its scheduler."""
        environment = dict(os.environ)
        if not self.address and torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(places)
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we hand it on once.
        self.process = subprocess.Popen(
            self.command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not self.address and not torch.cuda.is_available() and sys.platform == "linux":
            # What it starts later is bound to them, too, and counts no others.
            os.sched_setaffinity(self.process.pid, map(int, places))
        self.state, self.places, self.seconds = "running", places, -time.monotonic()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        with self.folder.with_suffix(".log").open("w") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                if said := re.fullmatch(r"(\d+)_\w+ (done in \d+ s|\.\.\.)", line.strip()):
                    self.notebook = said[1]
                    self.done += said[2] != "..."
                if line.startswith("error: "):
                    self.error = line.removeprefix("error: ").strip()

    def interrupt(self) -> None:
        """As Ctrl-C does it; a second one ends it at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def has_ended(self, patience: float = 0.0) -> bool:
        """Whether it has, or does within so many seconds; then its state says how."""
        if self.state != "running":
            return True
        assert self.process is not None and self.listener is not None
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        # What is left of it might still hold its output.
        self.listener.join(SECONDS_TO_READ)
        self.seconds += time.monotonic()
        self.state = {0: "finished", 130: "interrupted", 143: "interrupted"}.get(code, "failed")
        if self.state == "failed" and not self.error:
            self.error = f"it ended with status {code}: see {self.folder.with_suffix('.log')}"
        return True

    def end(self) -> None:
        """Have it ended now, if it has not."""
        if not self.has_ended():
            self.interrupt()
        if not self.has_ended(SECONDS_TO_END):
            assert self.process is not None
            self.process.kill()
            self.has_ended(SECONDS_TO_END)

    def row(self) -> tuple[str, ...]:
        """What the table says of it."""
        quality = ""
        # There may be no run, and the state says so.
        with contextlib.suppress(UserError, OSError):
            if self.run is not None:
                quality = summarise(open_run(self.run)).quality
        minutes = f"{self.seconds / 60:.1f}" if self.seconds else ""
        return self.label, self.state, minutes, quality, str(self.folder)


def run_profiles(
    names: Sequence[str],
    told: Sequence[str],
    overrides: Mapping[str, str],
    out: str | None = None,
    core: bool = False,
) -> int:
    """Execute notebooks with several profiles, side by side where workers are free for them.

    A place is a worker of the scheduler that a profile names, or else a GPU or a core of this
    machine; a series takes as many as its `n_workers`. One that fails ends no other.

    The first Ctrl-C or SIGTERM interrupts each as it does a single one, and begins no other; a
    second one ends all at once.

    Args:
        names: full names of the notebooks.
        told: profiles, each by its name or file.
        overrides: parameter -> text; stronger than each of the profiles.
        out: folder, in which each has one of its name; None makes one under `executed/`.
        core: as in `run_notebooks`.

    Returns:
        The exit status: 0 if all have finished, and otherwise 1.

    Raises:
        UserError: before anything is executed, if one of them could not be.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM.
    """
    labels = [Path(profile).stem for profile in told]
    if len({*labels}) < len(labels):
        raise ParameterError(f"the profiles are {', '.join(labels)}: give each name once")
    if "run" in overrides:
        raise ParameterError(
            f"run is {overrides['run']!r}, and there are {len(told)} profiles, each with a run of "
            "its own: name it in the profiles, or leave it out"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(out).resolve() if out else EXECUTED / stamp
    series = [_plan(names, profile, overrides, folder, stamp, core) for profile in told]
    for url, n in Counter(one.run for one in series if one.run).items():
        if n > 1:
            raise ParameterError(f"{n} of the profiles name the run {url}: give each its own")
    make_folder(folder)
    places = {address: _places(address) for address in {one.address for one in series}}
    waiting, leave = list(series), threading.Event()
    running: list[Series] = []
    try:
        with (
            interruptible(leave),
            ProgressBar(len(series) * len(names), "executing", "notebook") as bar,
        ):
            while (waiting or running) and not leave.wait(SECONDS_BETWEEN_LOOKS):
                for one in [one for one in running if one.has_ended()]:
                    running.remove(one)
                    bar.note(f"{one.label}: {one.state}" + (f": {one.error}" if one.error else ""))
                # One that waits for its scheduler's workers is in nobody's way here.
                for one in list(waiting):
                    if _begins(one, running, places[one.address]):
                        waiting.remove(one)
                        running.append(one)
                done = sum(one.done for one in series)
                text = ", ".join(f"{one.label} {one.notebook}".strip() for one in running)
                if (done, text) != (bar.done, bar.text):
                    bar.update(done - bar.done, text)
            for one in running:
                one.interrupt()
            for one in running:
                one.has_ended(SECONDS_TO_END)
    finally:
        for one in running:
            one.end()
        head = ("profile", "state", "minutes", "quality", "executed notebooks")
        print_table([head, *(one.row() for one in series)])
        for one in series:
            if one.error:
                print(f"{one.label}: {one.error}", file=sys.stderr)
    return 0 if all(one.state == "finished" for one in series) else 1


def _plan(
    names: Sequence[str],
    profile: str,
    overrides: Mapping[str, str],
    folder: Path,
    stamp: str,
    core: bool,
) -> Series:
    """Check all that a series is told."""
    label = Path(profile).stem
    values = profiles.series_values(names, profiles.read_profile(profile), overrides)
    run = place_of_run(names, values, f"{label}-{stamp}")
    command = [sys.executable, "-m", "gan_lib", "run", *names, "--profile", profile]
    command += ["--core"] if core else []
    command += ["--out", str(folder / label)]
    for name, text in [*overrides.items(), *([] if run is None else [("run", run)])]:
        command += ["-p", name, text]
    told = {k: v for n in names for k, v in profiles.notebook_parameters(n).items()} | values
    address, n_workers = told.get("address", ""), told.get("n_workers", 1)
    return Series(label, command, folder / label, run, address, n_workers)


def _places(address: str) -> list[str]:
    """The workers of a scheduler; or the GPUs of this machine, or its cores if it has none."""
    if address:
        client = connect(address)
        try:
            return list(client.nthreads())
        finally:
            close_cluster(client)
    if n_gpus := torch.cuda.device_count():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        return shown.split(",")
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(CPU_COUNT)
    # A container may see more of them than it gets.
    return list(map(str, cores[:CPU_COUNT]))


def _begins(one: Series, running: Sequence[Series], places: Sequence[str]) -> bool:
    """Start a series if there are places for it; it takes all if it wants more than there are."""
    taken = {place for other in running if other.address == one.address for place in other.places}
    free = [place for place in places if place not in taken]
    wanted = min(one.n_workers or len(places), len(places))
    if len(free) < wanted:
        return False
    one.start(free[:wanted])
    return True
