"""Where the time of a step goes, on each rank: as numbers, and as a picture.

`gan_lib.training.tracing.trace_steps` records what is shown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from gan_lib.results.figures import BLUE, GREEN, ORANGE, PINK, RED, legend_beside, new_figure

# What a rank does at a moment, and the colour in which it is drawn.
COLOURS = {
    "forward": BLUE,
    "backward": GREEN,
    "optimiser": ORANGE,
    "Python": "0.8",
    "waiting": RED,
    "exchange": PINK,
}


@dataclass(frozen=True)
class Span:
    """Part of some steps.

    Attributes:
        kind: "forward", "backward" and "optimiser" compute; "Python" is what lies between;
            "waiting" is what lies between until an exchange ends. "exchange" is not of the
            rank itself: gradients are on their way, while the rank may do something else.
        start: seconds since the first rank began.
        end: seconds, likewise.
    """

    kind: str
    start: float
    end: float


def seconds_by_kind(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of one rank by what it did; without "exchange" they add up to the whole."""
    return {kind: sum(s.end - s.start for s in spans if s.kind == kind) for kind in COLOURS}


def plot_timeline(traces: Sequence[Sequence[Span]]) -> Figure:
    """Two steps of all ranks on one clock: above what each does, below what is on its way.

    Args:
        traces: of each rank, as `run_ranks(client, trace_steps, parameters=...)` returns them.
    """
    figure, axes = new_figure(figsize=(11, 1.1 + 0.9 * len(traces)))
    for rank, spans in enumerate(traces):
        for kind, colour in COLOURS.items():
            bars = [(1e3 * s.start, 1e3 * (s.end - s.start)) for s in spans if s.kind == kind]
            below = kind == "exchange"
            axes.broken_barh(
                bars,
                (rank + 0.25, 0.2) if below else (rank - 0.4, 0.6),
                color=colour,
                label=kind if rank == 0 else None,
            )
    axes.set(
        title="two steps of each rank",
        xlabel="milliseconds",
        yticks=range(len(traces)),
        yticklabels=[f"rank {rank}" for rank in range(len(traces))],
    )
    axes.invert_yaxis()
    legend_beside(axes)
    return figure
