"""How much memory does a command take, with all processes that it starts?

    python benchmarks/memory.py .venv/bin/python -m gan_lib run --profile quick

Printed are the peak, how it grew, and what the processes were that had it. What several processes
share counts once (Linux's proportional set size). Pages of files, such as torch's libraries, are
left out: Linux takes them back where memory is short, and other programs may share them.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import time
from pathlib import Path

import psutil


def memory(root: psutil.Process) -> list[tuple[float, str]]:
    """Megabytes and command of each process from `root` down, the largest first."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        # It may end meanwhile.
        with contextlib.suppress(psutil.Error, OSError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kb = {line.split()[0]: int(line.split()[1]) for line in lines}
            own = kb["Pss_Anon:"] + kb["Pss_Shmem:"]
            found.append((own * 1024 / 1e6, " ".join(process.cmdline())))
    return sorted(found, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args()
    if not told.command:
        parser.error("no command: see the example")
    most: list[tuple[float, str]] = []
    peak = said = 0.0
    with subprocess.Popen(told.command) as running:
        while running.poll() is None:
            found = memory(psutil.Process(running.pid))
            total = sum(megabytes for megabytes, _ in found)
            if total > 1.1 * said:
                # As it grows: the command may be ended from outside.
                said, now = total, time.strftime("%H:%M:%S")
                print(f"{now} {total:,.0f} MB in {len(found)} processes", flush=True)
            if total > peak:
                most, peak = found, total
            time.sleep(told.every)
    print(f"\npeak: {peak:,.0f} MB, in {len(most)} processes")
    for megabytes, command in most:
        print(f"{megabytes:8,.0f} MB  {command[:110]}")
    return running.returncode


if __name__ == "__main__":
    raise SystemExit(main())
