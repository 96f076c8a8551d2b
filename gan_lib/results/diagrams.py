"""Drawings that explain, each a function without arguments: boxes, and arrows between them."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from gan_lib.results.figures import BLUE, RED, HouseFigure, new_figure

Place = tuple[float, float]
WIDTH, HEIGHT = 1.6, 0.8  # of a box


def draw_gan_loop() -> HouseFigure:
    """The two halves of a GAN's step: what flows forward, and how far each gradient goes back."""
    figure, (above, below) = new_figure(2, 1, figsize=(9, 5.2), height_ratios=(26, 18))
    names = ("latent\nvectors", "generator", "generated\nimages", "discriminator", "loss")
    places = [(0.8 + 2.2 * i, 1.2) for i in range(len(names))]
    for axes, learner, height in ((above, "discriminator", 2.6), (below, "generator", 1.8)):
        canvas(axes, width=10.4, height=height)
        axes.set_title(f"{learner} step: only the {learner} is changed", loc="left")
        for name, place in zip(names, places, strict=True):
            box(axes, place, name, BLUE if name == learner else "0.6")
        for here, there in pairwise(places):
            arrow(axes, beside(here, 1), beside(there, -1))
    box(above, (5.2, 2.2), "real\nimages", "0.6")
    arrow(above, (6.0, 2.0), (7.1, 1.6))
    _, g, _, d, loss = places
    for axes in (above, below):
        gradient(axes, loss, d, "gradient")
    gradient(below, d, g, "through the frozen discriminator, and the images")
    above.plot([6.3, 6.3], [0.3, 1.0], color=RED, linewidth=4)
    above.text(6.2, 0.3, "detach(): it stops here", color=RED, ha="right", va="bottom", fontsize=9)
    figure.alt = (
        "Two rows. Above, the discriminator step: latent vectors go through the generator and "
        "become images; these and real images go into the discriminator, and its scores into a "
        "loss. The gradient goes from the loss back into the discriminator and stops before the "
        "generated images, at detach(). Below, the generator step: the same way forward, without "
        "real images; the gradient goes from the loss through the discriminator, which is frozen, "
        "and through the images back into the generator."
    )
    return figure


def canvas(axes: Axes, width: float, height: float) -> None:
    """Make axes a sheet to draw on, from 0 to `width` and `height`."""
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")


def box(axes: Axes, place: Place, text: str, colour: str) -> None:
    """A box of a colour around a text, in the middle of `place`."""
    x, y = place[0] - WIDTH / 2, place[1] - HEIGHT / 2
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, style, fc="white", ec=colour, lw=2))
    axes.text(*place, text, ha="center", va="center", fontsize=9)


def beside(place: Place, side: int) -> Place:
    """The middle of a box's right edge, or of its left one for -1."""
    return place[0] + side * WIDTH / 2, place[1]


def arrow(axes: Axes, start: Place, end: Place, colour: str = "0.3") -> None:
    """A straight arrow."""
    look = {"arrowstyle": "-|>", "color": colour, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)


def gradient(axes: Axes, start: Place, end: Place, text: str) -> None:
    """The way back, from below one box to below another, with what is to be said of it."""
    low = start[1] - HEIGHT / 2 - 0.05
    look = {"arrowstyle": "-|>", "color": RED, "lw": 1.8, "ls": "--", "shrinkA": 0, "shrinkB": 0}
    look["connectionstyle"] = "bar,fraction=" + str(-0.32 / (start[0] - end[0]))
    axes.annotate("", (end[0] + 0.15, low), (start[0] - 0.15, low), arrowprops=look)
    middle = (start[0] + end[0]) / 2, low - 0.4
    axes.text(*middle, text, color=RED, ha="center", va="top", fontsize=9)
