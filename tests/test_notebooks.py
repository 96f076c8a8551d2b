"""The notebooks as their readers meet them, and the runner that executes them."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import nbformat
import pytest
import yaml
from distributed import Client
from foreign import started
from playwright.sync_api import sync_playwright

from gan_lib.__main__ import main
from gan_lib.base.errors import NotebookError, ParameterError
from gan_lib.base.progress import parse_progress
from gan_lib.cli import notebooks
from gan_lib.cli.notebooks import Executed, run_notebooks
from gan_lib.cli.profiles import (
    FOLDER,
    PROFILES,
    check_parameters,
    full_names,
    notebook_names,
    notebook_parameters,
    read_profile,
    series_values,
)
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.photographs import make_photographs
from gan_lib.practice.s3_server import serve_s3
from gan_lib.results.run import open_run
from gan_lib.results.writing import create_run
from gan_lib.training.rank import train_gan

NAMES = ["01_data", "02_models", "03_parameters", "04_distributed_training", "05_results"]


def load(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tagged(name: str, tag: str) -> list[int]:
    return [i for i, c in enumerate(load(name).cells) if tag in c.metadata.get("tags", [])]


def test_the_series_has_five_notebooks() -> None:
    assert notebook_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_skeleton(name: str) -> None:
    cells = load(name).cells
    first, last = cells[0].source, cells[-1].source
    assert re.match(rf"# {int(name[:2])}\. ", first)
    for part in ("What you will learn", "Prerequisites", "Minutes on two cores"):
        assert part in first, part
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "\n## Exercises" in f"\n{prose}"
    assert "## Recap" in last
    nexts = re.findall(r"\]\(([^)]+)\)", last)
    expected = NAMES[NAMES.index(name) + 1] + ".ipynb" if name != NAMES[-1] else "../README.md"
    assert expected in nexts


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs(name: str) -> None:
    for cell in load(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_plain_and_explained(name: str) -> None:
    assert len(tagged(name, "parameters")) == 1
    cell = load(name).cells[tagged(name, "parameters")[0]]
    assert tagged(name, "parameters")[0] == 1  # right after the introduction
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+ = .+?  # .+", line), line
    for default in notebook_parameters(name).values():
        assert type(default) in (int, float, bool, str)
    # The same name means the same thing, of the same type, everywhere.
    known = TrainingParameters().to_dict()
    for parameter, default in notebook_parameters(name).items():
        if parameter in known:
            assert type(default) is type(known[parameter]), parameter
        else:
            assert parameter in {
                "run",
                "n_workers",
                "address",
                "short_steps",
                "n_images",
                "columns",
            }


@pytest.mark.parametrize("name", NAMES)
def test_exercises_have_hidden_solutions(name: str) -> None:
    exercises, solutions = tagged(name, "exercise"), tagged(name, "solution")
    assert len(exercises) >= 2
    assert [i + 1 for i in exercises] == solutions
    cells = load(name).cells
    for i in solutions:
        assert cells[i].metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
        assert "assert " in cells[i].source
    for i in exercises:
        assert "Exercise" in cells[i - 1].source


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_plots_come_from_the_package(name: str) -> None:
    for cell in load(name).cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        assert len(cell.source.splitlines()) <= 20, cell.source
        ast.parse(cell.source)  # no magics: a cell is Python, and its code can be reused
        assert "plt." not in cell.source


def test_every_training_parameter_can_be_set_where_training_happens() -> None:
    assert set(TrainingParameters.names()) <= set(notebook_parameters("04_distributed_training"))


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_profiles_fit_the_notebooks(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Names, types and values; whether a public bucket answers is not this project's to test.
    monkeypatch.setattr("gan_lib.cli.profiles.check_source", lambda source: None)
    check_parameters(NAMES, read_profile(profile))


@contextlib.contextmanager
def photographs_in_s3_on_a_cluster(folder: Path) -> Iterator[dict[str, Any]]:
    """More than 1,000 images in a bucket, the run there too, on a scheduler that already runs."""
    photographs = make_photographs(folder / "photographs", n=101)
    for i in range(10):
        shutil.copytree(photographs, folder / "store/bucket/photographs", dirs_exist_ok=True)
        for path in (folder / "store").rglob("*_????.jpg"):
            path.rename(path.with_stem(f"{path.stem}-{i}"))
    # As Dask's nanny sets it, which these workers lack: two ranks of two threads each are slow.
    lean = {"OMP_NUM_THREADS": "1"}
    with serve_s3(folder / "store"), started(folder, environment=lean) as cluster:
        bucket = "s3://bucket"
        yield {
            "source": f"{bucket}/photographs", "run": f"{bucket}/run", "address": cluster.address,
            "channels": 3, "max_images": 0, "epochs": 2,
        }  # fmt: skip


@contextlib.contextmanager
def silhouettes_here(folder: Path) -> Iterator[dict[str, Any]]:
    """What the tiny profile says."""
    yield {"run": str(folder / "run")}


class Series(NamedTuple):
    """An executed series, the profile that it was given, and which notebooks it has."""

    done: Executed
    profile: dict[str, Any]
    names: list[str]

    def book(self, name: str) -> nbformat.NotebookNode:
        if name not in self.names:
            pytest.skip("it was left out: it needs neither the bucket nor the cluster")
        return nbformat.read(self.done.folder / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module", params=[silhouettes_here, photographs_in_s3_on_a_cluster])
def executed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Series]:
    """The executed series, and the profile that it was given.

    In a bucket only the core of those that need bucket or cluster, unless there is time for all.
    """
    core = request.param is photographs_in_s3_on_a_cluster and not request.config.getoption("long")
    names = [name for name in NAMES if not core or name[:2] in ("01", "04", "05")]
    folder = tmp_path_factory.mktemp("executed")
    with request.param(folder) as told:
        profile = read_profile("tiny") | told
        values = series_values(names, profile, {})
        done = run_notebooks(names, values, "tiny", str(folder / "notebooks"), core)
        yield Series(done, profile, names)


@pytest.mark.parametrize("name", NAMES)
def test_executes(name: str, executed: Series) -> None:
    done, profile, _ = executed
    notebook = executed.book(name)
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    given = {k: v for k, v in profile.items() if k in notebook_parameters(name)}
    if given:
        values = dict(re.findall(r"^(\w+) = (.*)$", injected[0].source, flags=re.MULTILINE))
        assert {k: ast.literal_eval(values[k]) for k in given} == given
    shown = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None, cell.source
            kinds = [output.output_type for output in cell.outputs]
            assert "error" not in kinds
            shown += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert shown >= 2  # there is something to look at
    assert (done.folder / f"{name}.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_pages_show_what_readers_need(name: str, executed: Series) -> None:
    cells = executed.book(name).cells
    folder = executed.done.folder
    page = (folder / f"{name}.html").read_text()
    kinds = [kind for c in cells for o in c.get("outputs", []) for kind in o.get("data", {})]
    images = re.findall(r'<img[^>]* src="data:image/\w+;base64,([^"]+)"', page)
    # Every picture, animations too, and none that is heavy.
    assert len(images) == kinds.count("image/png") + kinds.count("image/gif")
    assert "IPython.core.display" not in page
    assert all(len(image) < 400_000 for image in images)
    # Asides and solutions are folded; nothing is fetched from elsewhere.
    folded = sum("solution" in c.metadata.get("tags", []) for c in cells)
    folded += sum("jp-MarkdownHeadingCollapsed" in c.metadata for c in cells)
    assert page.count('<details class="fold">') == folded
    assert page.count("<details") == page.count("</details>")
    assert not re.findall(r'<(?:script|link)[^>]* (?:src|href)="http', page)
    for target, anchor in re.findall(r'href="([^"#:]+)(?:#([^"]*))?"', page):
        assert (folder / target).exists(), target
        assert not anchor or f'id="{anchor}"' in (folder / target).read_text(), anchor
    # Whoever cannot see a picture is told what it shows.
    pngs = [o.metadata["image/png"] for c in cells for o in c.get("outputs", [])
            if "image/png" in o.get("data", {})]  # fmt: skip
    assert all(png["alt"] for png in pngs)


def test_an_index_leads_to_everything(executed: Series) -> None:
    folder, profile = executed.done.folder, executed.profile
    page = (folder / "index.html").read_text()
    for target in re.findall(r'(?:href|src)="([^"#:]+)["#]', page):
        assert (folder / target).exists(), target
    for name in executed.names:
        assert f'href="{name}.html"' in page
        assert re.search(rf'src="pictures/{name}-\d+\.', page)
    assert f"in {profile['epochs']} epochs" in page
    assert str(executed.done.run) in page


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(scheme: Literal["light", "dark"], executed: Series) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        asked: list[str] = []
        view.on("request", lambda request: asked.append(request.url))
        for name in (*NAMES, "index"):
            view.goto((executed.done.folder / f"{name}.html").as_uri())
            assert view.evaluate("document.images.length") >= 2
            assert view.evaluate(broken) == 0
            assert view.evaluate("document.documentElement.scrollWidth") <= 1280
            background = view.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
            if name == "index":
                continue
            source = view.locator("pre", has_text="def ").first
            assert "mono" in source.evaluate("e => getComputedStyle(e).fontFamily")
            solution = view.locator("details.fold:not(details details)", has_text="Solution").first
            inside = solution.locator("pre").first
            assert not inside.is_visible()
            solution.locator("summary").first.click()
            assert inside.is_visible()
        assert all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()


def test_the_short_runs_are_as_long_as_they_were_told(executed: Series) -> None:
    profile = executed.profile
    notebook = executed.book("03_parameters")
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    ((epochs, steps),) = re.findall(r"^(\d+) epochs of (\d+) steps$", said, flags=re.MULTILINE)
    assert abs(int(epochs) * int(steps) - profile["short_steps"]) <= int(steps) / 2


def test_what_a_discriminator_pays_that_cannot_tell(executed: Series) -> None:
    notebook = executed.book("03_parameters")
    shown = [o.get("data", {}).get("text/plain", "") for c in notebook.cells
             for o in c.get("outputs", [])]  # fmt: skip
    (table,) = [text for text in shown if "has not learnt" in text]
    untrained, unsure = table.splitlines()[1:]
    # log 2 twice; and the best single answer, a probability of a quarter for labels 0.5 and 0.
    assert untrained.split()[-3:] == ["0.69", "0.69", "1.39"]
    assert unsure.split()[-3:] == ["0.84", "0.29", "1.12"]


def test_no_worker_of_a_cluster_that_was_there_is_killed(executed: Series) -> None:
    profile = executed.profile
    if "address" not in profile:
        pytest.skip("it started its own")
    with Client(profile["address"]) as client:
        # They were started without a nanny: nobody starts a killed one again.
        assert len(client.nthreads()) == 2


def test_pictures_lie_beside_the_notebooks(executed: Series) -> None:
    folder = executed.done.folder
    pictures = [path.name for path in (folder / "pictures").iterdir()]
    for name in executed.names:
        assert any(picture.startswith(name) for picture in pictures)
    assert any(picture.endswith(".gif") for picture in pictures)


def test_the_run_is_where_it_was_asked_for(executed: Series) -> None:
    done, profile, _ = executed
    assert done.run == profile["run"]
    run = open_run(profile["run"])
    assert run.epochs("records") == list(range(1, profile["epochs"] + 1))
    # Nothing is left of the trainings on the way.
    fs, root = fsspec.core.url_to_fs(profile["run"])
    assert not fs.exists(f"{root}-patient")
    assert not fs.exists(f"{root}-practice")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lrg": 0.1}, ["lrg", "lr_g"]),
        ({"batch_size": -1}, ["batch_size", "-1"]),
        ({"epochs": "many"}, ["epochs", "many"]),
        ({"source": "/nowhere/at/all"}, ["/nowhere/at/all", "does not exist"]),
        ({"source": "TEXTS"}, ["none of the 1 files", ".txt"]),
        ({"address": "tcp://127.0.0.1:9"}, ["tcp://127.0.0.1:9", "no Dask scheduler"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_profile_ends_in_one_sentence(
    change: dict[str, object],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gan_lib.cluster.starting.SECONDS_TO_CONNECT", 1)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    if change.get("source") == "TEXTS":
        change = {"source": str(tmp_path / "texts")}
    profile = tmp_path / "wrong.yaml"
    profile.write_text(yaml.safe_dump(read_profile("tiny") | change))
    assert main(["run", "--profile", str(profile), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()  # nothing was executed
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    sentence = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(sentence) == 1
    for word in words:
        assert word in sentence[0]


def test_other_wrong_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"no profile 'quik'.*quick"):
        read_profile("quik")
    for content, words in (("a: [", "is not YAML"), ("- a", "holds no `name: value` lines")):
        (tmp_path / "wrong.yaml").write_text(content)
        with pytest.raises(ParameterError, match=words):
            read_profile(str(tmp_path / "wrong.yaml"))
    with pytest.raises(ParameterError, match=r"no notebook '09'.*01_data"):
        full_names(["09"])
    # A notebook of its own is not given what it does not have.
    with pytest.raises(ParameterError, match="no parameter 'lr_g'"):
        series_values(["02_models"], {}, {"lr_g": "0.1"})
    for name in ("n_workers", "short_steps"):
        with pytest.raises(ParameterError, match=f"{name} is -2"):
            series_values(NAMES, {}, {name: "-2"})


def test_the_command_line_speaks_the_types_of_the_notebooks() -> None:
    given = {"lr_g": "1e-3", "epochs": "7", "flip": "true", "source": "dog-silhouettes"}
    assert full_names(["04"]) == ["04_distributed_training"]
    assert series_values(["04_distributed_training"], {}, given) == {
        "lr_g": 0.001,
        "epochs": 7,
        "flip": True,
        "source": "dog-silhouettes",
    }


def test_all_parameters_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--parameters"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "04 05           run = " in "\n".join(listed)
    for parameter in (*TrainingParameters.names(), "short_steps", "n_workers", "n_images"):
        (line,) = [line for line in listed if f" {parameter} = " in line]
        assert "  # " in line


def test_a_failing_cell_is_named_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("seed = 0  # any", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("print('before')"),
            nbformat.v4.new_code_cell("wrong = 1 / seed"),
            nbformat.v4.new_code_cell("print('never')"),
        ],
        metadata={"language_info": {"name": "python"}},
    )
    nbformat.write(notebook, tmp_path / "01_broken.ipynb")
    monkeypatch.setattr("gan_lib.cli.profiles.FOLDER", tmp_path)
    with pytest.raises(NotebookError, match=r"01_broken, cell 4 \(`wrong = 1 / seed`\)") as caught:
        run_notebooks(["01_broken"], {"seed": 0}, "broken", folder=str(tmp_path / "out"))
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    kept = nbformat.read(tmp_path / "out" / "01_broken.ipynb", as_version=4)
    assert any("before" in o.get("text", "") for c in kept.cells for o in c.get("outputs", []))
    assert (tmp_path / "out" / "01_broken.html").exists()


def test_the_bar_of_a_cell_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with notebooks._SeriesProgress(2) as progress:
        progress.begin("04_distributed_training")
        progress.write("training 13/13 step epoch 13/13")
        assert "13/13" in str(progress._inner)
        progress.cell_done()
        progress.begin("05_results")
        assert str(progress._inner).strip() == ""


@pytest.mark.long
def test_results_of_a_run_of_one_epoch_with_blank_pictures(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=1, lr_g=1e-12), run=place, progress=False)
    done = run_notebooks(["05_results"], {"run": place}, "short", folder=str(tmp_path / "out"))
    cells = nbformat.read(done.folder / "05_results.ipynb", as_version=4).cells
    said = str([cell.get("outputs") for cell in cells])
    assert "new: " in said  # blank is no copy
    assert [line["epoch"] for line in open_run(place).quality()] == [1]  # measured here
    assert "epochs 1 to 1" not in said
    assert "bin/tensorboard --logdir" in said


def test_a_run_that_has_nothing_yet_is_told_so(tmp_path: Path, tiny: TrainingParameters) -> None:
    create_run(str(tmp_path / "run"), tiny)
    with pytest.raises(NotebookError, match=r"RunError: there is too little in .*run yet"):
        run_notebooks(
            ["05_results"], {"run": str(tmp_path / "run")}, "none", folder=str(tmp_path / "out")
        )


def test_headless_progress_is_read_back() -> None:
    line = parse_progress("training 35/1024 step epoch 3/64 loss_d 1.2 loss_g 0.7 500 images/s")
    assert line is not None
    assert (line.description, line.done, line.total, line.unit) == ("training", 35, 1024, "step")
    assert line.text.startswith("epoch 3/64")
    assert parse_progress("something else") is None
