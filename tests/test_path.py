"""The two ways through the notebooks: the core, which stands alone, and the asides beside it."""

from __future__ import annotations

import builtins
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from gan_lib.__main__ import main
from gan_lib.base.checkout import CHECKOUT
from gan_lib.cli.notebooks import read_notebook
from gan_lib.cli.profiles import notebook_names

NAMES = notebook_names()
# How long a reader takes: reckoned, so that a schedule can be made of it.
WORDS_A_MINUTE, SECONDS_A_CELL, MINUTES_AN_EXERCISE = 200, 15, 4


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def level(cell: nbformat.NotebookNode) -> int:
    """Of the heading that a cell begins with; 99 if it begins with none."""
    heading = re.match(r"(#+) ", cell.source) if cell.cell_type == "markdown" else None
    return len(heading[1]) if heading else 99


@pytest.mark.parametrize("name", NAMES)
def test_an_aside_is_a_folded_section(name: str) -> None:
    cells = read_notebook(name).cells
    inside = 99
    for cell in cells:
        folds = bool(re.match(r"#+ Aside: ", cell.source)) and cell.cell_type == "markdown"
        if level(cell) <= inside and not folds:
            inside = 99
        if folds and level(cell) <= inside:
            inside = level(cell)
        # JupyterLab hides what stands below a folded heading, down to the next one of its level.
        assert ("aside" in tags(cell)) == (inside < 99), cell.source
        assert cell.metadata.get("jp-MarkdownHeadingCollapsed", False) == folds, cell.source
        assert "parameters" not in tags(cell) or inside == 99


@pytest.mark.parametrize("name", NAMES)
def test_the_core_has_two_exercises(name: str) -> None:
    core = read_notebook(name, core=True).cells
    assert sum("exercise" in tags(cell) for cell in core) == 2
    assert sum("solution" in tags(cell) for cell in core) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ends_with_three_questions_and_hidden_answers(name: str) -> None:
    core = read_notebook(name, core=True).cells
    (place,) = [i for i, cell in enumerate(core) if cell.source.startswith("## Three questions")]
    headings = [c.source.splitlines()[0] for c in core[place + 1 :] if c.cell_type == "markdown"]
    assert headings in (["## Closing", "## Recap"], ["## Recap"])
    _, *parts = core[place].source.split("<details><summary>")
    assert len(parts) == 3
    for number, part in enumerate(parts, start=1):
        question, _, answer = part.partition("</summary>")
        assert question.startswith(f"{number}. ") and question.endswith("?")
        assert "`" not in question  # inside HTML nobody makes code of it
        assert len(answer.removesuffix("</details>").split()) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_readers_predict_before_they_look(name: str) -> None:
    cells = read_notebook(name, core=True).cells
    question = re.compile(r"\*\*(Predict|Before) .+?:\*\*")
    asked = [i for i, cell in enumerate(cells) if question.search(cell.source)]
    assert len(asked) >= 2
    for i in asked:
        # The cell below answers; or, where there is something to be read first, the text.
        assert cells[i + 1].cell_type == "code" or "**Before you read on:**" in cells[i].source


def test_the_glossary_is_linked_from_the_first_use() -> None:
    page = (CHECKOUT / "docs/glossary.md").read_text()
    words = [word.replace(" ", "-") for word in re.findall(r"^### (.+)$", page, flags=re.MULTILINE)]
    # One spelling, small: an anchor is the same in JupyterLab, in an executed page and at GitHub.
    assert words == sorted(words) and "".join(words).islower()
    linked = {
        anchor: name
        for name in reversed(NAMES)
        for cell in read_notebook(name).cells
        for anchor in re.findall(r"\]\(\.\./docs/glossary\.md#([^)]+)\)", cell.source)
    }
    assert linked.keys() == set(words)


def names_of(source: str) -> tuple[set[str], set[str]]:
    """What a cell defines, and what it needs that it does not define."""
    module = symtable.symtable(source, "cell", "exec")
    defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    defined |= {s.get_name() for s in module.get_symbols() if s.is_namespace()}
    used = {s.get_name() for s in module.get_symbols() if s.is_referenced()}

    def inner(table: symtable.SymbolTable) -> Iterator[str]:
        for child in table.get_children():
            yield from (s.get_name() for s in child.get_symbols() if s.is_global())
            yield from inner(child)

    return defined, (used | set(inner(module))) - defined - set(dir(builtins))


@pytest.mark.parametrize("name", NAMES)
def test_no_core_cell_needs_what_an_aside_defines(name: str) -> None:
    owner: dict[str, str] = {}
    for cell in read_notebook(name).cells:
        if cell.cell_type != "code":
            continue
        defined, needed = names_of(cell.source)
        assert needed <= owner.keys(), f"{needed - owner.keys()} in {cell.source}"
        if "aside" not in tags(cell):
            # Also not one that an aside has given another meaning.
            assert all(owner[n] == "core" for n in needed), (cell.source, needed)
        owner |= dict.fromkeys(defined, "aside" if "aside" in tags(cell) else "core")


def counted(name: str, core: bool) -> tuple[int, int, int]:
    """Cells, words and minutes of a notebook, or of its core."""
    cells = read_notebook(name, core).cells
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    exercises = sum("exercise" in tags(c) for c in cells)
    shown = [c for c in cells if not {"parameters", "exercise", "solution"} & set(tags(c))]
    code = sum(c.cell_type == "code" for c in shown)
    minutes = words / WORDS_A_MINUTE + code * SECONDS_A_CELL / 60
    return len(cells), words, round(minutes + exercises * MINUTES_AN_EXERCISE)


def test_the_counts_are_those_that_teachers_read() -> None:
    rows = {name: (*counted(name, True), *counted(name, False)) for name in NAMES}
    rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))  # type: ignore[assignment]
    right = [f"| {name} | {' | '.join(f'{n:,}' for n in row)} |" for name, row in rows.items()]
    text = (CHECKOUT / "docs/teaching.md").read_text()
    for name, row in rows.items():
        found = re.search(rf"^\| {name} \|(.*)\|$", text, flags=re.MULTILINE)
        said = [int(n.replace(",", "")) for n in found[1].split("|")] if found else []
        # A sentence more or less leaves the table as it is.
        near = [abs(a - b) <= max(2, 0.05 * b) for a, b in zip(said, row, strict=False)]
        assert len(said) == 6 and all(near), "docs/teaching.md wants\n" + "\n".join(right)


@pytest.mark.long
def test_the_core_executes_alone(tmp_path: Path) -> None:
    out, run = tmp_path / "out", str(tmp_path / "run")
    assert main(["run", "--core", "--profile", "tiny", "--out", str(out), "-p", "run", run]) == 0
    for name in NAMES:
        cells = nbformat.read(out / f"{name}.ipynb", as_version=4).cells
        assert not any("aside" in tags(cell) for cell in cells)
        assert all(c.execution_count is not None for c in cells if c.cell_type == "code")
