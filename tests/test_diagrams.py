"""Every diagram can be drawn, and says in words what it shows."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable

import pytest

from gan_lib.results import diagrams
from gan_lib.results.figures import HouseFigure

DIAGRAMS = [
    function
    for name, function in inspect.getmembers(diagrams, inspect.isfunction)
    if name.startswith("draw_") and not inspect.signature(function).parameters
]


@pytest.mark.parametrize("draw", DIAGRAMS)
def test_a_diagram_is_drawn_and_told(draw: Callable[[], HouseFigure]) -> None:
    figure = draw()
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.alt.split()) >= 20
