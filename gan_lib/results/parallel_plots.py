"""What several processes did, by the clock: tasks and restarts; and what all-reduce does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gan_lib.results.figures import BLUE, GREEN, RED, legend_beside, new_figure
from gan_lib.results.run import Run


def plot_task_stream(tasks: Sequence[Mapping[str, Any]]) -> Figure:
    """Which worker computed when: a bar for each task.

    Args:
        tasks: of a Dask cluster, as `distributed.get_task_stream` collects them.
    """
    workers = sorted({task["worker"] for task in tasks})
    spans = [
        (workers.index(task["worker"]), span["start"], span["stop"])
        for task in tasks
        for span in task["startstops"]
        if span["action"] == "compute"
    ]
    rows, starts, ends = (np.array(values) for values in zip(*spans, strict=True))
    figure, axes = new_figure(figsize=(9, 0.6 * len(workers) + 1.4))
    axes.barh(rows, ends - starts, left=starts - starts.min(), height=0.8, edgecolor="white")
    axes.set_yticks(range(len(workers)), [f"worker {i}" for i in range(len(workers))])
    title = f"{len(spans)} calls on {len(workers)} workers"
    axes.set(title=title, xlabel="seconds", ylabel="worker")
    axes.invert_yaxis()
    return figure


def plot_all_reduce(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Figure:
    """The same few numbers of the gradient on each rank, before all-reduce and after it."""
    figure, panels = new_figure(1, 2, figsize=(10, 3.2))
    wide, high = 0.8 / len(before), 1.1 * max(np.abs(values).max() for values in before)
    for axes, ranks, when in zip(panels, (before, after), ("before", "after"), strict=True):
        for rank, values in enumerate(ranks):
            where = np.arange(len(values)) + (rank - (len(ranks) - 1) / 2) * wide
            axes.bar(where, values, width=wide, label=f"rank {rank}")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(title=f"{when} all-reduce", xlabel="weight", ylabel="gradient", ylim=(-high, high))
    legend_beside(panels[1])
    return figure


def plot_clock(
    run: Run, before: pd.DataFrame | None = None, marks: Mapping[str, float] | None = None
) -> Figure:
    """Iterations by the clock; each restart leaves a gap, and what was done twice is shown.

    Args:
        run: whose records; its checkpoints are marked.
        before: records that were read before a worker was lost: what was recorded anew is drawn
            from here.
        marks: name -> time, as `time.time()` tells it, of what is to be marked.
    """
    figure, axes = new_figure(figsize=(9, 3.6))
    records = run.records()
    started = records["time"].min()
    if before is not None:
        lost = before[~before["time"].isin(records["time"])]
        label = f"done, and done again: {len(lost)} records"
        _draw_records(axes, lost, started, RED, label)
    _draw_records(axes, records, started, BLUE, "recorded")
    steps = run.info()["steps_per_epoch"]
    kept = records[records["iteration"].isin([steps * e for e in run.epochs("checkpoints")])]
    axes.plot(kept["time"] - started, kept["iteration"], "D", color=GREEN, label="checkpoint")
    for number, (name, when) in enumerate((marks or {}).items()):
        axes.axvline(when - started, color=f"C{4 + number % 3}", linestyle="--", label=name)
    axes.set(title="iterations by the clock", xlabel="seconds", ylabel="iteration")
    # Between two records of one attempt passes nearly the same time; a restart takes longer.
    pauses = records["time"].diff()
    for i in pauses.nlargest(len(run.status().restarts)).index:
        axes.axvspan(*(records["time"][[i - 1, i]] - started), color=RED, alpha=0.15)
    legend_beside(axes)
    return figure


def _draw_records(
    axes: Axes, records: pd.DataFrame, started: float, colour: str, label: str
) -> None:
    axes.plot(records["time"] - started, records["iteration"], ".", color=colour, ms=4, label=label)
