"""How it looks: loss curves, bars, shares; and, from `walls`, images, sample grids, animations.

Every function reads arrays or a run directory and returns a figure (or a GIF)
that a notebook shows when it is the last line of a cell.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gan_lib.data.image_set import ImageSet
from gan_lib.results.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    legend_beside,
    new_figure,
    show_picture,
)
from gan_lib.results.files import LOSSES
from gan_lib.results.parallel_plots import plot_all_reduce as plot_all_reduce
from gan_lib.results.parallel_plots import plot_clock as plot_clock
from gan_lib.results.parallel_plots import plot_task_stream as plot_task_stream
from gan_lib.results.run import Run
from gan_lib.results.walls import animate_images as animate_images
from gan_lib.results.walls import animate_samples as animate_samples
from gan_lib.results.walls import plot_images as plot_images
from gan_lib.results.walls import plot_real_and_generated as plot_real_and_generated
from gan_lib.results.walls import plot_rows as plot_rows
from gan_lib.results.walls import plot_samples as plot_samples
from gan_lib.results.walls import plot_without_denormalising as plot_without_denormalising

# Only what a notebook shows needs IPython; training on a cluster does without.
if TYPE_CHECKING:
    from IPython import display

LOSS_LABELS = {
    "loss_d_real": "discriminator, real images",
    "loss_d_fake": "discriminator, generated images",
    "loss_d": "discriminator, both",
    "loss_g": "generator",
}
LOSS_COLOURS = dict(zip(LOSSES, (GREEN, PINK, BLUE, ORANGE), strict=True))


def show_source(*things: Any) -> display.Markdown:
    """The source of functions or classes, highlighted: the real code, not a copy of it."""
    from IPython import display

    source = "\n\n\n".join(inspect.getsource(thing).rstrip() for thing in things)
    # Markdown, because that has the colours of the page: dark, where JupyterLab is dark.
    return display.Markdown(f"~~~~python\n{source}\n~~~~")


def plot_images_per_class(images: ImageSet) -> Figure:
    """How many images each class has."""
    counts = images.images_per_class()
    figure, axes = new_figure(figsize=(max(4.0, 0.12 * len(counts) + 3), 3.2))
    axes.bar(range(len(counts)), list(counts.values()))
    if len(counts) <= 20:
        axes.set_xticks(range(len(counts)), list(counts), rotation=30, ha="right")
    axes.set(title=f"{len(images):,} images of {images.source}", xlabel="class", ylabel="images")
    return figure


def plot_pixel_values(images: np.ndarray) -> Figure:
    """Histograms of the same pixels before and after normalisation: uint8, N x H x W x C."""
    figure, (left, right) = new_figure(1, 2, figsize=(10, 3.2))
    left.hist(images.ravel(), bins=64, range=(0, 255), density=True)
    left.set(title="as stored: uint8", xlabel="pixel value", ylabel="density")
    right.hist(images.ravel() / 127.5 - 1.0, bins=64, range=(-1, 1), density=True)
    right.set(title="as the networks see it: normalised", xlabel="pixel value", ylabel="density")
    return figure


def plot_losses(
    records: pd.DataFrame,
    epochs: Sequence[int] | None = None,
    smooth: int = 1,
    losses: Sequence[str] = LOSSES,
) -> Figure:
    """Losses by iteration.

    Args:
        records: of a run.
        epochs: only these, e.g. `[15]` or `range(134, 138)`; None means all.
        smooth: mean over this many records; what it smooths stays visible, pale.
        losses: which.
    """
    figure, axes = new_figure(figsize=(9, 4))
    chosen = records if epochs is None else records[records["epoch"].isin(list(epochs))]
    _draw_losses(axes, chosen, smooth, losses)
    found = sorted(chosen["epoch"].unique())
    span = f"epoch {found[0]}" if len(found) == 1 else f"epochs {found[0]} to {found[-1]}"
    over = f", mean over {smooth} records" if smooth > 1 else ""
    axes.set(title=f"losses, {span}{over}", xlabel="iteration", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(axes)
    return figure


def plot_comparison(
    records: Mapping[str, pd.DataFrame], loss: str = "loss_d", smooth: int = 5, log: bool = False
) -> Figure:
    """One loss of several runs, by iteration.

    Args:
        records: name of the run -> its records.
        loss: which.
        smooth: mean over this many records.
        log: a logarithmic scale, for losses that run away.
    """
    figure, axes = new_figure(figsize=(9, 4))
    for name, table in records.items():
        axes.plot(table["iteration"], _smoothed(table[loss], smooth), label=name)
    axes.set(title=f"loss of the {LOSS_LABELS[loss]}", xlabel="iteration", ylabel="loss")
    if log:
        _logarithmic(axes)
    legend_beside(axes)
    return figure


def plot_bars(
    values: Mapping[str, float], title: str, unit: str, ideal: Mapping[str, float] | None = None
) -> Figure:
    """A bar for each name, with its value on it; by powers of ten if they differ hundredfold.

    Across those that `ideal` names, a line where each would end.
    """
    figure, axes = new_figure(figsize=(1.5 + 1.6 * len(values), 3.4))
    bars = axes.bar(list(values), list(values.values()), width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}")
    if ideal:
        at = np.array([list(values).index(name) for name in ideal])
        style = {"colors": "0.4", "linestyles": "--", "label": "ideal"}
        axes.hlines([*ideal.values()], at - 0.4, at + 0.4, **style)
        axes.legend(frameon=False)
    axes.set(title=title, xlabel="", ylabel=unit)
    axes.margins(y=0.15)
    smallest = min(values.values())
    if max(values.values()) > 100 * smallest > 0:
        _logarithmic(axes)
        axes.set_ylim(bottom=min(1, smallest / 10))
    return figure


def plot_curves(tables: Mapping[str, pd.DataFrame], unit: str) -> Figure:
    """A panel for each table, all on one scale: a line for each column, over the index."""
    figure, panels = new_figure(1, len(tables), figsize=(3.6 * len(tables) + 0.4, 3.4))
    for axes, (title, table) in zip(np.ravel(panels), tables.items(), strict=True):
        axes.plot(table.index, table, label=list(table))
        axes.set(title=title, xlabel=str(table.index.name), ylabel=unit)
        axes.legend(frameon=False)
        axes.sharey(figure.axes[0])
    return figure


def plot_shares(shares: Sequence[Sequence[np.ndarray]], title: str) -> Figure:
    """Which rank sees which image in which step: `epoch_shares`' result as a map."""
    figure, axes = new_figure(figsize=(9, 3.4))
    n_images = sum(len(share) for step in shares for share in step)
    for rank in range(len(shares[0])):
        steps = np.concatenate([np.full(len(step[rank]), i) for i, step in enumerate(shares)])
        seen = np.concatenate([step[rank] for step in shares])
        axes.scatter(steps, seen, s=3 if n_images > 200 else 20, label=f"rank {rank}")
    axes.set(title=title, xlabel="step", ylabel="index of the image")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(axes, markerscale=4 if n_images > 200 else 1)
    return figure


def plot_progress(run: Run, records: pd.DataFrame | None = None) -> Figure:
    """Newest samples and all losses so far, side by side; `records` are the run's, if known."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.4), width_ratios=(2, 3))
    kept = run.epochs("samples")
    if kept:
        show_picture(left, run.samples(kept[-1:])[kept[-1]], f"epoch {kept[-1]}")
    else:
        left.axis("off")
        left.set_title("no samples yet")
    records = run.records() if records is None else records
    if len(records):
        _draw_losses(right, records, smooth=max(1, len(records) // 50), losses=("loss_d", "loss_g"))
        right.legend(frameon=False)
    right.set(title="losses", xlabel="iteration", ylabel="loss")
    return figure


def _draw_losses(axes: Axes, records: pd.DataFrame, smooth: int, losses: Sequence[str]) -> None:
    iterations = records["iteration"]
    for name in losses:
        colour = LOSS_COLOURS[name]
        if smooth > 1:
            axes.plot(iterations, records[name], color=colour, alpha=0.2)
        smoothed = _smoothed(records[name], smooth)
        axes.plot(iterations, smoothed, color=colour, label=LOSS_LABELS[name])


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    # Over many powers of ten, names of what lies between would touch each other.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes.get_ylim()[1] < 1e4 else (1,)))
    axes.yaxis.set_major_formatter("{x:,.10g}")  # matplotlib's own writes formulas
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")


def _smoothed(values: pd.Series, window: int) -> pd.Series:
    return values.rolling(window, center=True, min_periods=1).mean()
