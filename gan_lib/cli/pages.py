"""What is read of executed notebooks: an HTML of each that needs no network, and an index.html."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from PIL import Image, ImageSequence

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import UserError
from gan_lib.cli.profiles import FOLDER
from gan_lib.results.pictures import png_bytes
from gan_lib.results.quality import best_line
from gan_lib.results.run import open_run

TEMPLATES = Path(__file__).with_name("templates")
# The endings of the pictures that a cell can show.
PICTURES = {"image/png": ".png", "image/gif": ".gif"}
# Larger ones are written anew for the page, with losses that nobody sees.
LARGE_PICTURE = 100_000
# What only a live kernel can show.
WIDGET = "application/vnd.jupyter.widget-view+json"


def export_notebook(path: Path, names: Sequence[str]) -> None:
    """Next to an executed notebook: an HTML of it, and its pictures under `pictures/`.

    `names` are the notebooks that have or will have a page there.
    """
    if not path.exists():
        return
    notebook = nbformat.read(path, as_version=4)
    for i, (_, kind, data) in enumerate(_pictures(notebook), start=1):
        name = f"{path.stem}-{i:02d}{PICTURES[kind]}"
        (path.parent / "pictures" / name).write_bytes(data)
    _write_page(notebook, path.with_suffix(".html"), names)


def write_index(folder: Path, names: Sequence[str], run: str | None) -> Path:
    """`index.html` over executed notebooks: a card for each, and what is known of the run."""
    cards = [_card(folder, name) for name in names if (folder / f"{name}.html").exists()]
    glossary = CHECKOUT / "docs" / "glossary.md"
    if glossary.exists():
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(glossary.read_text())])
        _write_page(page, folder / "glossary.html", names)
    values = {"cards": cards, "glossary": glossary.exists(), "run": run, **_figures(run)}
    template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    index = folder / "index.html"
    index.write_text(template.get_template("index.html.j2").render(values), encoding="utf-8")
    return index


def _write_page(notebook: nbformat.NotebookNode, target: Path, names: Sequence[str]) -> None:
    _fold(notebook.cells)
    for output, kind, data in _pictures(notebook):
        alt = output.get("metadata", {}).get(kind, {}).get("alt", "a picture of this cell")
        kind, data = _light(kind, data)
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        output.data["text/html"] = f'<img alt="{html.escape(alt)}" src="{source}">'
    link = partial(_link, page=target, names=names)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([^)\s]+)\)", link, cell.source)
        outputs = [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})]
        cell.update({"outputs": outputs} if cell.cell_type == "code" else {})
    exporter = HTMLExporter(template_name="executed", extra_template_basedirs=[str(TEMPLATES)])
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": target.stem}})
    target.write_text(page, encoding="utf-8")


def _fold(cells: list[nbformat.NotebookNode]) -> None:
    """Say at which cells something folded begins and ends: asides, and within them solutions."""
    inside = False
    for i, cell in enumerate(cells):
        tags = cell.metadata.get("tags", [])
        heading = re.match(r"#+ (Aside: .+)", cell.source) if "aside" in tags else None
        if inside and (heading or "aside" not in tags):
            cells[i - 1].metadata.setdefault("folds_end", []).append("aside")
            inside = False
        cell.metadata["folds"] = [heading[1].replace("`", "")] if heading else []
        inside = inside or heading is not None
        if "solution" in tags:
            cell.metadata["folds"].append("Solution")
            cell.metadata["folds_end"] = ["solution"]
    if inside:
        cells[-1].metadata.setdefault("folds_end", []).append("aside")


def _link(found: re.Match[str], page: Path, names: Sequence[str]) -> str:
    """Links between notebooks and to the repository, as they are from where the page lies."""
    target, _, anchor = found[1].partition("#")
    end = f"#{anchor}" if anchor else ""
    if "://" in target or not target:
        return found[0]
    if target.endswith(".ipynb"):
        name = Path(target).stem
        if name in names or (page.parent / f"{name}.html").exists():
            return f"]({name}.html{end})"
        # It has not been executed here: the notebook itself has no anchors that a browser knows.
        return f"]({os.path.relpath(FOLDER / f'{name}.ipynb', page.parent)})"
    if target.endswith("glossary.md"):
        return f"](glossary.html{end})"
    return f"]({os.path.relpath(CHECKOUT / 'docs' / target, page.parent)}{end})"


def _pictures(notebook: nbformat.NotebookNode) -> Iterator[tuple[Any, str, bytes]]:
    """Every picture: the output that holds it, its kind, its bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in PICTURES:
                if kind in output.get("data", {}):
                    yield output, kind, base64.b64decode(output["data"][kind])


def _light(kind: str, data: bytes) -> tuple[str, bytes]:
    if len(data) < LARGE_PICTURE:
        return kind, data
    picture = Image.open(io.BytesIO(data), formats=("PNG", "GIF"))
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    times = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(picture)]
    smaller, more = io.BytesIO(), {"save_all": True, "append_images": frames[1:], "loop": 0}
    frames[0].save(smaller, "webp", quality=80, method=2, duration=times, **more)
    return "image/webp", smaller.getvalue()


def _card(folder: Path, name: str) -> dict[str, Any]:
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    marked = [o for c in notebook.cells if "card" in c.metadata.get("tags", []) for o in c.outputs]
    every = sorted(path.name for path in (folder / "pictures").glob(f"{name}-*"))
    # The cell tagged `card` has the picture; without one, the first picture stands for it.
    chosen = [p for p, (o, *_) in zip(every, _pictures(notebook), strict=True) if o in marked]
    first = notebook.cells[0].source
    return {
        "name": name,
        "title": first.partition("\n")[0].lstrip("# "),
        "learnt": re.findall(r"^- (.+)$", first.replace("`", ""), flags=re.MULTILINE)[:3],
        "seconds": notebook.metadata.get("papermill", {}).get("duration"),
        "cells": len(notebook.cells),
        "pictures": every,
        "picture": (chosen or every or [""])[0],
    }


def _figures(url: str | None) -> dict[str, Any]:
    """What the run has come to, and its newest picture; nothing where there is none yet."""
    known: dict[str, Any] = {"figures": {}, "samples": ""}
    with contextlib.suppress(UserError):
        if url is None:
            return known
        run = open_run(url)
        samples, records = run.epochs("samples"), run.plain_records(run.epochs("records")[-1:])
        if not (samples and records):
            return known
        info, newest = run.info(), records[-1]
        known["samples"] = base64.b64encode(
            png_bytes(run.samples(samples[-1:])[samples[-1]])
        ).decode()
        known["figures"] = {
            "state": run.status().state,
            "images": f"{info['images']:,} of {info['parameters']['source']}",
            "steps": f"{newest['iteration']:,} in {newest['epoch']} epochs",
            "ranks": f"{info['world_size']}, on {info['device']}",
            "speed": f"{newest['images_per_second']:,.0f} images/s",
        }
        best = best_line(run.quality(), run.epochs("checkpoints"))
        if best is not None:
            known["figures"]["best epoch"] = f"{best['epoch']}, with a KID of {best['kid']:.3f}"
    return known
