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
    "sliders.children[0].value = 255",
]


def test_a_moved_slider_draws_the_figure_anew() -> None:
    shown = []
    for n_cells in (1, 2):
        cells = [nbformat.v4.new_code_cell(source) for source in CELLS[:n_cells]]
        notebook = nbformat.v4.new_notebook(cells=cells)
        NotebookClient(notebook, kernel_name="python3").execute()
        picture, sliders = notebook.cells[0].outputs
        assert "application/vnd.jupyter.widget-view+json" in sliders["data"]
        assert picture["metadata"]["image/png"]["alt"] == "4 images"  # they begin in the middle
        data = base64.b64decode(picture["data"]["image/png"])
        shown.append(np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=int))
    before, after = shown
    middle = (len(before) * 3 // 4, before.shape[1] // 3)
    assert before[middle] == 153
    assert after[middle] == 255
