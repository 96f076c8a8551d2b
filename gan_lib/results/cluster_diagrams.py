"""Drawings of what works together: a cluster, a run directory, the life of a job."""

from __future__ import annotations

from gan_lib.results.diagrams import arrow, box, canvas
from gan_lib.results.figures import BLUE, GREEN, ORANGE, RED, HouseFigure, new_figure


def draw_cluster() -> HouseFigure:
    """Client, scheduler and workers, and what flows between them."""
    figure, axes = new_figure(figsize=(9, 3.6))
    canvas(axes, width=11, height=4.2)
    axes.set_title("who talks to whom")
    client, scheduler = (1.2, 2.1), (4.6, 2.1)
    workers = [(8.9, 3.4), (8.9, 2.1), (8.9, 0.8)]
    box(axes, client, "client\n(this notebook)", BLUE)
    box(axes, scheduler, "scheduler", ORANGE)
    for i, place in enumerate(workers):
        box(axes, place, f"worker {i}\n(a process)", GREEN)
        y = 2.1 + 0.25 * (1 - i)
        arrow(axes, (5.5, y), (8.0, place[1] + 0.12), ORANGE)
        arrow(axes, (8.0, place[1] - 0.12), (5.5, y - 0.1), GREEN)
    arrow(axes, (2.1, 2.3), (3.7, 2.3), BLUE)
    arrow(axes, (3.7, 1.9), (2.1, 1.9), ORANGE)
    axes.text(2.9, 2.45, "functions,\narguments", ha="center", va="bottom", fontsize=9)
    axes.text(2.9, 1.75, "futures,\nresults", ha="center", va="top", fontsize=9)
    axes.text(6.5, 3.3, "tasks", color=ORANGE, ha="center", fontsize=9)
    axes.text(6.5, 0.75, "what became of them", color=GREEN, ha="center", fontsize=9)
    look = {"arrowstyle": "<|-|>", "color": "0.3", "lw": 1.5, "ls": ":"}
    for above, below in ((workers[0], workers[1]), (workers[1], workers[2])):
        axes.annotate("", (9.9, below[1]), (9.9, above[1]), arrowprops=look)
    axes.text(10.05, 2.1, "gradients,\nwhile they\ntrain", va="center", fontsize=9)
    figure.alt = (
        "Three columns. On the left the client, which is this notebook: it sends functions and "
        "arguments to the scheduler in the middle, and gets futures and results back. The "
        "scheduler sends tasks to three workers on the right, each a process, and hears what "
        "became of them. While they train, the workers send each other gradients directly."
    )
    return figure


def draw_run_directory() -> HouseFigure:
    """Who writes which part of a run directory, and who reads it."""
    figure, axes = new_figure(figsize=(9, 4.2))
    canvas(axes, width=11, height=5.2)
    axes.set_title("a run directory: one writer, any number of readers")
    parts = {
        "parameters.json": "once, at the start",
        "status.json": "every 15 seconds",
        "records/epoch_0001.jsonl": "while an epoch goes on",
        "samples/epoch_0001.png": "after an epoch",
        "checkpoints/epoch_0016.pt": "every checkpoint_every epochs",
        "quality.jsonl": "every quality_every epochs",
    }
    box(axes, (1.1, 2.6), "rank 0\nof the job", GREEN)
    for i, (name, when) in enumerate(parts.items()):
        y = 4.6 - 0.8 * i
        axes.text(3.5, y, name, family="monospace", fontsize=9, va="center")
        axes.text(3.5, y - 0.28, when, color="0.4", fontsize=8, va="center")
        arrow(axes, (1.95, 2.6), (3.4, y - 0.1), GREEN)
    readers = {
        "watch()": 4.3,
        "open_run(URL)\nelsewhere": 2.6,
        "resume() on\nanother cluster": 0.9,
    }
    for name, y in readers.items():
        box(axes, (9.6, y), name, BLUE)
        arrow(axes, (6.6, 2.6), (8.75, y), BLUE)
    figure.alt = (
        "Rank 0 of a job writes six kinds of files into the run directory: parameters once, the "
        "status every 15 seconds, records while an epoch goes on, samples after each epoch, "
        "checkpoints and the measure of quality now and then. On the right who reads them: watch, "
        "another notebook that opens the run, and resume on another cluster."
    )
    return figure


def draw_life_of_a_job() -> HouseFigure:
    """From launch through a lost worker to the end, and on from there."""
    figure, axes = new_figure(figsize=(9, 3.2))
    canvas(axes, width=12, height=3.8)
    axes.set_title("the life of a job")
    waiting, training, lost, stopped = (1.1, 2.6), (4.3, 2.6), (4.3, 0.7), (7.8, 2.6)
    box(axes, waiting, "waiting", ORANGE)
    box(axes, training, "training", GREEN)
    box(axes, lost, "a worker\nis lost", RED)
    box(axes, stopped, "finished\nor stopped", BLUE)
    box(axes, (7.8, 0.7), "failed", "0.4")
    box(axes, (10.9, 2.6), "resumed", GREEN)
    for start, end, text, place in (
        ((1.95, 2.6), (3.45, 2.6), "workers\nare there", (2.7, 2.75)),
        ((5.15, 2.6), (6.95, 2.6), "last epoch,\nstop()", (6.05, 2.75)),
        ((8.65, 2.6), (10.05, 2.6), "resume()", (9.35, 2.75)),
        ((4.3, 2.15), (4.3, 1.15), "", (0, 0)),
        ((3.45, 0.7), (1.1, 2.15), "from the last\ncheckpoint", (1.5, 0.75)),
        ((5.15, 2.2), (6.95, 1.0), "an error of\nyour code", (6.75, 1.6)),
        ((5.15, 0.7), (6.95, 0.7), "max_restarts", (6.05, 0.75)),
    ):
        arrow(axes, start, end)
        axes.text(*place, text, ha="center", va="bottom", fontsize=8)
    figure.alt = (
        "A job waits until its workers are there, then it trains. If a worker is lost, it waits "
        "again and goes on from the last checkpoint, at most max_restarts times. After the last "
        "epoch, or after stop, it has ended, and resume goes on from there, on any cluster. An "
        "error of the user's code ends it as failed, at once."
    )
    return figure
