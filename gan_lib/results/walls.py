"""Walls of images: of any images, of a run's samples, real beside generated; and animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from gan_lib.data.image_set import evenly_spread
from gan_lib.results.figures import new_figure, show_picture
from gan_lib.results.pictures import cut_apart, gif_bytes, image_grid
from gan_lib.results.run import Run

# Only what a notebook shows needs IPython; training on a cluster does without.
if TYPE_CHECKING:
    from IPython import display

# Small images are shown enlarged, so that a 32-pixel dog can be seen.
INCHES_PER_IMAGE = 0.7
# Between the images of a wall, in pixels of a small image.
GAP = 2
# Of each picture, where more than two stand side by side.
MOST_ROWS = 4


def plot_images(
    images: np.ndarray, title: str, columns: int | None = None, labels: Sequence[str] | None = None
) -> Figure:
    """A wall of images.

    Args:
        images: uint8, N x H x W x C.
        title: of the figure.
        columns: as many as make it square, if None.
        labels: a name above each image.
    """
    if labels is None:
        wide = columns or max(1, round(np.sqrt(len(images))))
        figure, axes = new_figure(figsize=_wall_size(-(-len(images) // wide), wide))
        show_picture(axes, _wall(images, wide), title)
        return figure
    columns = columns or min(len(images), 8)
    rows = -(-len(images) // columns)
    figure, grid_axes = new_figure(rows, columns, figsize=(1.5 * columns, 1.8 * rows + 0.4))
    for i, axes in enumerate(np.ravel(grid_axes)):
        axes.axis("off")
        if i < len(images):
            show_picture(axes, images[i], labels[i], fontsize=8)
    figure.suptitle(title)
    return figure


def plot_rows(rows: Mapping[str, np.ndarray], title: str) -> Figure:
    """A wall with a name at the left of each row.

    Args:
        rows: name -> its images, uint8, N x H x W x C; equally many in each row.
        title: of the figure.
    """
    images = np.concatenate(list(rows.values()))
    n, height = len(images) // len(rows), images.shape[1] + _gap(images)
    width, tall = _wall_size(len(rows), n)
    figure, axes = new_figure(figsize=(width + 0.09 * max(map(len, rows)) + 0.2, tall))
    show_picture(axes, _wall(images, n), title)
    axes.axis("on")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks([i * height + images.shape[1] / 2 for i in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    return figure


def plot_real_and_generated(real: np.ndarray, generated: np.ndarray) -> Figure:
    """Real images on the left, as many generated ones on the right: uint8, N x H x W x C."""
    n = min(len(real), len(generated))
    figure, (left, right) = new_figure(1, 2, figsize=(11, 5.8))
    show_picture(left, _wall(real[:n]), "real images")
    show_picture(right, _wall(generated[:n]), "generated images")
    return figure


def plot_without_denormalising(images: np.ndarray) -> Figure:
    """The same images with the normalisation undone, and as they look when one forgets to."""
    figure, (left, right) = new_figure(1, 2, figsize=(9, 4.9))
    show_picture(left, _wall(images), "normalisation undone")
    show_picture(right, _wall(_forgotten(images)), "shown as they leave the generator")
    return figure


def plot_samples(
    run: Run, epochs: Sequence[int | str] | None = None, denormalise: bool = True
) -> Figure:
    """The same latent vectors after several epochs.

    Args:
        run: whose samples.
        epochs: which, "best" among them; None takes up to four, evenly spread. Of more than two
            the upper left 4 x 4 images are shown.
        denormalise: False shows the generator's -1..1 as if it were 0..1.
    """
    kept = run.epochs("samples")
    pictures = run.samples(epochs if epochs is not None else spread_epochs(kept, 4))
    n = len(pictures)
    figure, grid_axes = new_figure(1, n, figsize=(3.6 * n, 4.1) if n < 3 else (3.0 * n, 3.5))
    for axes, (epoch, picture) in zip(np.ravel(grid_axes), pictures.items(), strict=True):
        side = run.parameters.image_size
        if n > 2:  # the upper left quarter, large enough to be seen
            picture = picture[: MOST_ROWS * side, : MOST_ROWS * side]
        images = cut_apart(picture, side)
        show_picture(axes, _wall(images if denormalise else _forgotten(images)), f"epoch {epoch}")
    what = "normalisation undone" if denormalise else "normalisation not undone"
    figure.suptitle(f"the same latent vectors by epoch, {what}")
    return figure


def animate_samples(run: Run, frames: int = 40, width: int = 256) -> display.Image:
    """The same latent vectors over the epochs, as a GIF.

    Args:
        run: whose samples.
        frames: at most this many epochs, evenly spread.
        width: of the picture, in pixels; small ones are enlarged by a whole number.
    """
    pictures = run.samples(spread_epochs(run.epochs("samples"), frames))
    return animate_images(list(pictures.values()), width, [f"epoch {epoch}" for epoch in pictures])


def animate_images(
    images: np.ndarray | Sequence[np.ndarray], width: int = 192, names: Sequence[str] = ()
) -> display.Image:
    """Images one after the other, as a GIF, each below its name: uint8, N x H x W x C."""
    from IPython import display

    return display.Image(data=gif_bytes(images, width, names), format="gif")


def spread_epochs(epochs: Sequence[int], n: int) -> list[int]:
    """At most `n` of them, evenly spread."""
    return [epochs[i] for i in evenly_spread(min(n, len(epochs)), len(epochs))]


def _gap(images: np.ndarray) -> int:
    return GAP * max(1, int(images.shape[2]) // 32)


def _wall(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    return image_grid(images, columns, _gap(images))


def _wall_size(rows: int, columns: int) -> tuple[float, float]:
    return max(columns * INCHES_PER_IMAGE, 3.0), max(rows * INCHES_PER_IMAGE, 0.7) + 0.4


def _forgotten(picture: np.ndarray) -> np.ndarray:
    """A picture in -1..1 shown as if it were in 0..1: all below the middle is black."""
    return (np.clip(picture / 127.5 - 1.0, 0.0, 1.0) * 255).astype(np.uint8)
