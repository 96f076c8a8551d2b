"""What the runs of a sweep draw of the same latent vectors, side by side: a figure, and a page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gan_lib.base.errors import ParameterError, UserError, describe
from gan_lib.results.figures import new_figure, show_picture
from gan_lib.results.grids import grid_of
from gan_lib.results.pictures import image_grid, png_bytes
from gan_lib.results.quality import best_line
from gan_lib.results.sweep import TABLE, Sweep

PICTURE, PAGE = "sweep.png", "sweep.html"
IMAGES_PER_CELL = 16
INCHES_PER_CELL, MOST_INCHES = 1.9, 30.0
# Between the images of a cell, in pixels.
GAP = 2


@dataclass(frozen=True)
class Cell:
    """What is shown of a run: its picture, H x W x C, or a sentence that says why there is none."""

    picture: np.ndarray | None
    text: str


def draw_cells(sweep: Sweep, n: int = IMAGES_PER_CELL, seed: int = 0) -> dict[str, Cell]:
    """Have the generator of each run draw the same latent vectors: run -> what is shown of it.

    It is that of the best epoch where one was measured, and of the newest checkpoint otherwise.
    """
    return {name: _draw(sweep, name, n, seed) for name in sweep.runs}


def _draw(sweep: Sweep, name: str, n: int, seed: int) -> Cell:
    state, error = sweep.state(name)
    if state == "failed":
        return Cell(None, f"failed: {error.partition(chr(10))[0]}")
    try:
        run = sweep.run(name)
        if run is None:
            return Cell(None, "not begun")
        best = best_line(run.quality(), run.epochs("checkpoints"))
        text = "".join(map(str, run.positions()[-1:]))
        if best is not None:
            text = f"epoch {best['epoch']}, KID {best['kid']:.3f}"
        images = run.generate(n, "latest" if best is None else best["epoch"], seed)
    except (UserError, OSError) as wrong:
        return Cell(None, describe(wrong))
    return Cell(image_grid(images, gap=GAP), text if state == "finished" else f"{text} ({state})")


def plot_sweep(
    sweep: Sweep,
    rows: str = "",
    columns: str = "",
    where: Mapping[str, Any] | None = None,
    cells: Mapping[str, Cell] | None = None,
) -> Figure:
    """Pictures of the same latent vectors, by the values of two parameters.

    A cell shows the first run of the list that fits, in grey where it has failed.

    Args:
        sweep: whose.
        rows: a parameter that varies; empty takes the first one.
        columns: another; empty takes the second one.
        where: only runs of these values of the others.
        cells: of `draw_cells`, if they have been drawn.

    Raises:
        ParameterError: if one of the parameters does not vary.
    """
    grid, where = grid_of(sweep.runs), dict(where or {})
    for name in filter(None, (rows, columns, *where)):
        if name not in grid:
            raise ParameterError(f"{name} does not vary in {sweep.url}: {', '.join(grid)} do")
    rows = rows or next(name for name in grid if name != columns)
    columns = columns or next((name for name in grid if name != rows), "")
    cells = draw_cells(sweep) if cells is None else cells
    down, across = grid[rows], grid.get(columns, [""])
    inches = min(INCHES_PER_CELL, MOST_INCHES / max(len(down), len(across)))
    size = (inches * len(across) + 0.9, inches * 1.18 * len(down) + 0.6)
    figure, axes = new_figure(len(down), len(across), figsize=size)
    for i, row in enumerate(np.reshape(axes, (len(down), len(across)))):
        for j, panel in enumerate(row):
            wanted = where | {rows: down[i]} | ({columns: across[j]} if columns else {})
            cell = _first(sweep, wanted, cells)
            _show_cell(panel, cell)
            if i == 0 and columns:
                panel.set_title(f"{columns} = {across[j]}\n{panel.get_title()}", fontsize=8)
            if j == 0:
                panel.set_ylabel(f"{rows} = {down[i]}", fontsize=8)
    others = [f"{n} = {where[n]}" if n in where else f"first {n} that fits"
              for n in grid if n not in (rows, columns)]  # fmt: skip
    figure.suptitle(", ".join(["the same latent vectors in each run", *others]), fontsize=10)
    return figure


def _first(sweep: Sweep, wanted: Mapping[str, Any], cells: Mapping[str, Cell]) -> Cell:
    for name, values in sweep.runs.items():
        if wanted.items() <= values.items():
            return cells[name]
    return Cell(None, "not in this sweep")


def _show_cell(axes: Any, cell: Cell) -> None:
    if cell.picture is None:
        axes.set_facecolor("0.85")
        text = "\n".join(textwrap.wrap(cell.text, 26)[:9])
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=axes.transAxes)
        axes.set_box_aspect(1)
        axes.grid(False)
    else:
        show_picture(axes, cell.picture, cell.text, fontsize=7)
        axes.axis("on")
    axes.set(xticks=[], yticks=[])


def sweep_page(sweep: Sweep, cells: Mapping[str, Cell] | None = None) -> str:
    """The same as one HTML page that needs nothing else: images inlined, sliders for the
    parameters that are neither rows nor columns, and the table below."""
    cells = draw_cells(sweep) if cells is None else cells
    runs = [
        {"values": list(values.values()), "text": cells[name].text, "image": _inline(cells[name])}
        for name, values in sweep.runs.items()
    ]
    told = json.dumps({"grid": grid_of(sweep.runs), "runs": runs})
    table = sweep.table().to_html(index=False, na_rep="", escape=True, border=0)
    # What others may have written must not end the script, or begin an element.
    parts = {"TITLE": html.escape(f"sweep {sweep.url}"), "DATA": told.replace("<", "\\u003c")}
    parts["TABLE"] = table
    # In one pass: what is put in is not looked through.
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], _PAGE)


def _inline(cell: Cell) -> str:
    if cell.picture is None:
        return ""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(cell.picture)).decode()}"


def write_results(sweep: Sweep, pictures: bool = True) -> None:
    """Put the table, and the pictures, in the folder of a sweep.

    Raises:
        OSError: if it cannot be written.
    """
    sweep.folder.write(TABLE, sweep.table().to_csv(index=False).encode())
    if pictures:
        cells = draw_cells(sweep)
        buffer = io.BytesIO()
        plot_sweep(sweep, cells=cells).savefig(buffer, dpi=150)
        sweep.folder.write(PICTURE, buffer.getvalue())
        sweep.folder.write(PAGE, sweep_page(sweep, cells).encode())


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>@TITLE@</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 2em; }
td, th { padding: 3px 8px; text-align: left; font-weight: normal; vertical-align: top; }
#grid td { width: 160px; min-width: 160px; background: #ddd; font-size: 12px; }
#grid img { width: 160px; image-rendering: pixelated; display: block; }
label { margin-right: 2em; }
</style>
<h1>@TITLE@</h1>
<p>The same latent vectors in each run.</p>
<p id="controls"></p><table id="grid"></table>
<h2>Runs</h2>@TABLE@
<script type="application/json" id="data">@DATA@</script>
<script>
const { grid, runs } = JSON.parse(document.getElementById("data").textContent);
const names = Object.keys(grid), axes = [names[0], names[1] ?? ""], chosen = {};
const full = names.reduce((n, name) => n * grid[name].length, 1) === runs.length;
// 0 is any value: the first run that fits is shown, which a list with gaps begins with.
for (const name of names) chosen[name] = full ? 1 : 0;

function element(parent, tag, told = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), told));
}
function show() {
  const table = document.getElementById("grid");
  table.replaceChildren();
  const [down, across] = axes, head = element(table, "tr");
  element(head, "th");
  const values = grid[across] ?? [""];
  for (const v of values) element(head, "th", { textContent: across && `${across} = ${v}` });
  for (const d of grid[down]) {
    const row = element(table, "tr");
    element(row, "th", { textContent: `${down} = ${d}` });
    for (const a of values) {
      const run = runs.find(({ values }) => names.every((name, i) =>
        name === down ? values[i] === d : name === across ? values[i] === a
          : chosen[name] === 0 || values[i] === grid[name][chosen[name] - 1]));
      const cell = element(row, "td");
      if (run?.image) element(cell, "img", { src: run.image, alt: "" });
      element(cell, "span", { textContent: run ? run.text : "not in this sweep" });
    }
  }
}
function controls() {
  const place = document.getElementById("controls");
  place.replaceChildren();
  for (const i of [0, 1].slice(0, names.length)) {
    const label = element(place, "label", { textContent: i ? "columns " : "rows " });
    const select = element(label, "select");
    for (const name of names) element(select, "option", { value: name, textContent: name });
    select.value = axes[i];
    select.onchange = () => {
      if (axes[1 - i] === select.value) axes[1 - i] = axes[i];
      axes[i] = select.value;
      controls();
    };
  }
  for (const name of names.filter((name) => !axes.includes(name))) {
    const label = element(place, "label", { textContent: `${name} ` });
    const told = { type: "range", min: 0, max: grid[name].length, value: chosen[name] };
    const slider = element(label, "input", told), text = element(label, "span");
    const tell = () => {
      text.textContent = chosen[name] ? ` ${grid[name][chosen[name] - 1]}` : " any";
    };
    slider.oninput = () => { chosen[name] = Number(slider.value); tell(); show(); };
    tell();
  }
  show();
}
controls();
</script></html>
"""
