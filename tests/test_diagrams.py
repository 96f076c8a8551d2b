"""Every diagram can be drawn, and says in words what it shows."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable

import pytest

from gan_lib.results import cluster_diagrams, diagrams
from gan_lib.results.figures import HouseFigure

DIAGRAMS = [
    function
    for module in (diagrams, cluster_diagrams)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("draw_") and not inspect.signature(function).parameters
]


@pytest.mark.parametrize("draw", DIAGRAMS)
def test_a_diagram_is_drawn_and_told(draw: Callable[[], HouseFigure]) -> None:
    figure = draw()
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.alt.split()) >= 20
