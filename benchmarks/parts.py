"""Where did the time of a run go?

    python benchmarks/parts.py RUN [RUN ...]

Reads the records of runs that were trained by anything: of the time from the first record to the
last, the share of each part, as rank 0 saw it. What is left is Python between the parts.
"""

from __future__ import annotations

import sys

from gan_lib.results.run import open_run
from gan_lib.training.stopwatch import PARTS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(f"| run | seconds | {' | '.join(PARTS)} | between |")
    print(f"|{'---|' * (len(PARTS) + 3)}")
    for url in sys.argv[1:]:
        records = open_run(url).records()
        seconds = records["time"].iloc[-1] - records["time"].iloc[0]
        # The first record tells of the time before it.
        shares = [records[f"seconds_{part}"].iloc[1:].sum() / seconds for part in PARTS]
        told = " | ".join(f"{share:.1%}" for share in (*shares, 1 - sum(shares)))
        print(f"| {url} | {seconds:.0f} | {told} |")


if __name__ == "__main__":
    main()
