"""How good it is: the measure by epoch, and generated images beside the nearest real ones."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gan_lib.base.errors import RunError
from gan_lib.data.image_set import ImageSet
from gan_lib.quality.novelty import NearestImages
from gan_lib.results.figures import GREEN, RED, legend_beside, new_figure
from gan_lib.results.quality import best_line
from gan_lib.results.run import Run
from gan_lib.results.walls import plot_images


def plot_quality(run: Run, network: str = "") -> Figure:
    """KID by epoch with its spread, the floor of real images, and the epoch that is best.

    Args:
        run: that was measured.
        network: as in `Run.quality`.

    Raises:
        RunError: if nothing was measured.
    """
    lines = run.quality(network)
    if not lines:
        raise RunError(f"{run.url} was not measured yet: call measure() on it")
    figure, axes = new_figure(figsize=(9, 3.6))
    epochs = [line["epoch"] for line in lines]
    spreads = [line["kid_spread"] for line in lines]
    axes.errorbar(
        epochs, [line["kid"] for line in lines], yerr=spreads, marker=".", label="generated"
    )
    floor = lines[-1]["kid_floor"]
    axes.axhline(floor, color=GREEN, linestyle="--", label="other real images: the floor")
    best = best_line(lines, run.epochs("checkpoints"))
    if best is not None:
        label = f"best that is kept: epoch {best['epoch']}, {best['kid']:.3f}"
        axes.plot(best["epoch"], best["kid"], "o", color=RED, markersize=9, label=label)
    title = f"distance from real images (features of {lines[-1]['network']})"
    axes.set(title=title, xlabel="epoch", ylabel="KID: lower is better")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(axes)
    return figure


def plot_nearest(
    found: NearestImages, generated: np.ndarray, images: ImageSet, n: int = 8
) -> Figure:
    """The most suspicious generated images, and below each the training image nearest to it.

    Args:
        found: what `nearest_training_images` found.
        generated: that it was given.
        images: that it was given.
        n: so many pairs.
    """
    chosen = found.generated[:n], found.real[:n], found.ratios[:n]
    pairs = np.concatenate([generated[chosen[0]], images.pixels[chosen[1]]])
    labels = ["generated"] * len(chosen[0]) + [f"ratio {ratio:.2f}" for ratio in chosen[2]]
    verdict = str(found).partition(";")[0]
    title = f"the most suspicious, and the training images nearest to them\n{verdict}"
    return plot_images(pairs, title, len(chosen[0]), labels)


def plot_ratios(found: NearestImages) -> Figure:
    """How near generated images are to one training image, beside how near real ones are.

    Args:
        found: what `nearest_training_images` found.
    """
    figure, axes = new_figure(figsize=(9, 3.4))
    both = {"generated": found.ratios, "real, by chance": found.by_chance}
    # None is known where all images are one image.
    known_of = {name: ratios[np.isfinite(ratios)] for name, ratios in both.items()}
    bins = np.linspace(0, max(1.0, *(known.max(initial=0) for known in known_of.values())), 41)
    for name, known in known_of.items():
        part = np.full(len(known), 1 / max(1, len(known)))
        axes.hist(known, bins, weights=part, histtype="step", linewidth=2, label=name)
    axes.axvline(found.threshold, color=RED, linestyle="--", label="threshold: 5 % of the real")
    title = "how much nearer the nearest training image is than the next"
    axes.set(
        title=title,
        xlabel="ratio of the two distances, over what 5 % of the real have",
        ylabel="part of the images",
    )
    legend_beside(axes)
    return figure
