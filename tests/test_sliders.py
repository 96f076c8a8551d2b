"""A figure with sliders, in a real kernel."""

from __future__ import annotations

import base64
import io

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

CELLS = [
    """
import numpy as np
from gan_lib.results.plots import plot_images
from gan_lib.results.sliders import with_sliders

def draw(grey, n):
    return plot_images(np.full((n, 8, 8, 1), grey, dtype=np.uint8), f"{n} images")

sliders = with_sliders(draw, grey=range(0, 256, 51), n=[1, 4, 9])
sliders
""",
    "sliders.children[0].value = 51",
]


def test_a_moved_slider_draws_the_figure_anew() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    NotebookClient(notebook, kernel_name="python3").execute()
    picture, sliders = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in sliders["data"]
    assert picture["metadata"]["image/png"]["alt"] == "4 images"  # they begin in the middle
    data = base64.b64decode(picture["data"]["image/png"])
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    # Grey 51, of the second cell, and no longer the 153 that they began with.
    assert shown[len(shown) * 3 // 4, shown.shape[1] // 3] == 51
    assert (shown == 153).mean() < 0.05  # of letters
