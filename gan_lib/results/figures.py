"""What every figure is drawn on: its style, and what it says to who cannot see it.

Figures are drawn by `plots`, `walls`, `quality_plots` and `diagrams`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

# Sizes, fonts, and colours that are told apart also by who does not see red or green.
STYLE = Path(__file__).with_name("house.mplstyle")
BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)


class HouseFigure(Figure):
    """A figure of this project.

    Text in it is text: the names of files and classes may hold a $, and are no formulas.

    Attributes:
        alt: what it shows, for who cannot see it; empty takes its titles.
    """

    alt: str = ""

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)

    def described(self) -> str:
        """The alternative text."""
        titles = [self.get_suptitle(), *(axes.get_title() for axes in self.axes)]
        return self.alt or "; ".join(title for title in titles if title)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # matplotlib draws it; this goes with the picture into the notebook and its HTML.
        return {}, {"image/png": {"alt": self.described()}}


def new_figure(*shape: int, figsize: tuple[float, float], **grid: Any) -> tuple[HouseFigure, Any]:
    """A figure and its axes; the cell that ends with it shows it once."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            *shape, figsize=figsize, layout="constrained", gridspec_kw=grid, FigureClass=HouseFigure
        )
    # A figure that pyplot still holds is drawn a second time at the end of the cell.
    plt.close(figure)
    assert isinstance(figure, HouseFigure)
    return figure, axes


def show_picture(
    axes: Axes, picture: np.ndarray, title: str, fontsize: float | None = None
) -> None:
    """A picture, uint8, H x W x C, without axes."""
    grey = picture.shape[-1] == 1
    # Few pixels are shown as squares; many are not worth the moiré.
    interpolation = "nearest" if picture.shape[0] < 256 else "antialiased"
    # From black to white, also where there is neither: a haze is to look like one.
    shown = picture.squeeze(-1) if grey else picture
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation=interpolation)
    axes.set_title(title, fontsize=fontsize)
    axes.axis("off")


def legend_beside(axes: Axes, **look: Any) -> None:
    """A legend to the right of the curves, where it hides none."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, **look)
