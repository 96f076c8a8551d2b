"""A figure with sliders: drawn anew when one is moved, and there where nobody can move one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

# Only what a notebook shows needs them.
if TYPE_CHECKING:
    from ipywidgets import VBox


def with_sliders(draw: Callable[..., Figure], **values: Sequence[Any]) -> VBox:
    """Show a figure, and a slider for each value that it is drawn of, as the last line of a cell.

    The figure is an ordinary output of the cell, so that the notebook shows it in its HTML, too.

    Args:
        draw: called with a value for each name.
        values: name -> its values from left to right; a slider begins in their middle.
    """
    from IPython.display import display
    from ipywidgets import SelectionSlider, VBox

    sliders = {
        name: SelectionSlider(
            options=list(choices),
            value=choices[len(choices) // 2],
            description=name.replace("_", " "),
            continuous_update=False,  # drawing takes longer than the hand
        )
        for name, choices in values.items()
    }

    def drawn() -> Figure:
        return draw(**{name: slider.value for name, slider in sliders.items()})

    picture = display(drawn(), display_id=True)
    for slider in sliders.values():
        slider.observe(lambda _: picture.update(drawn()), names="value")
    return VBox(list(sliders.values()))
