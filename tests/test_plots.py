"""Every plot has a title, named axes where it has axes, and a legend for several lines."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageSequence

from gan_lib.data.batches import epoch_shares
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.drawing import latent_vectors, latent_walk, render
from gan_lib.parameters import TrainingParameters
from gan_lib.results import plots
from gan_lib.results.pictures import cut_apart, image_grid
from gan_lib.results.run import Run, open_run
from gan_lib.training.rank import train_gan


@pytest.fixture(scope="module")
def run(tiny: TrainingParameters, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = str(tmp_path_factory.mktemp("plots") / "run")
    train_gan(tiny, run=place)
    return open_run(place)


TASKS = [
    {"worker": worker, "startstops": [{"action": "compute", "start": 3.0 + i, "stop": 3.5 + i}]}
    for i, worker in enumerate(("tcp://a", "tcp://b", "tcp://a"))
]
GRADIENTS = [[np.array([1.0, -2.0]), np.array([3.0, 0.0])], [np.array([2.0, -1.0])] * 2]

PLOTS: dict[str, Callable[[Run, ImageSet], Any]] = {
    "plot_images": lambda run, images: plots.plot_images(images.pixels[:9], "dogs"),
    "plot_rows": lambda run, images: plots.plot_rows(
        {"dogs": images.pixels[:4], "more dogs": images.pixels[4:8]}, "dogs"
    ),
    "plot_real_and_generated": lambda run, images: plots.plot_real_and_generated(
        images.pixels, run.generate(16)
    ),
    "plot_images_per_class": lambda run, images: plots.plot_images_per_class(images),
    "plot_pixel_values": lambda run, images: plots.plot_pixel_values(images.pixels),
    "plot_without_denormalising": lambda run, images: plots.plot_without_denormalising(
        images.pixels[:16]
    ),
    "plot_samples": lambda run, images: plots.plot_samples(run, [1, 4], denormalise=False),
    "plot_losses": lambda run, images: plots.plot_losses(run.records(), [2, 3], smooth=2),
    "plot_comparison": lambda run, images: plots.plot_comparison(
        {"one": run.records(), "other": run.records()}
    ),
    "plot_bars": lambda run, images: plots.plot_bars({"a": 1.0, "b": 2.0}, "speed", "images/s"),
    "plot_curves": lambda run, images: plots.plot_curves(
        {"a": run.records().set_index("iteration")[["loss_d", "loss_g"]]}, "loss"
    ),
    "plot_shares": lambda run, images: plots.plot_shares(epoch_shares(96, 32, 2, 0, 1), "shares"),
    "plot_clock": lambda run, images: plots.plot_clock(run, run.records(), {"killed": 0.0}),
    "plot_task_stream": lambda run, images: plots.plot_task_stream(TASKS),
    "plot_all_reduce": lambda run, images: plots.plot_all_reduce(*GRADIENTS),
    "plot_progress": lambda run, images: plots.plot_progress(run),
}


def test_every_plot_is_tested() -> None:
    public = {name for name, _ in inspect.getmembers(plots, inspect.isfunction)}
    assert {name for name in public if name.startswith("plot_")} == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_titles_axes_and_legends(name: str, run: Run, silhouettes: ImageSet) -> None:
    figure = PLOTS[name](run, silhouettes)
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO(), format="png")  # it can be drawn
    for axes in figure.axes:
        assert axes.get_title()
        # Bars and rows carry their names themselves.
        if axes.axison and name != "plot_rows":
            assert axes.get_ylabel()
            assert axes.get_xlabel() or name == "plot_bars"
        labelled = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        if len(labelled) > 1 or len(axes.collections) > 1:
            assert axes.get_legend() is not None


def test_images_of_a_wall_stand_apart_and_rows_have_names(silhouettes: ImageSet) -> None:
    figure = plots.plot_rows({"one": silhouettes.pixels[:3], "two": silhouettes.pixels[3:6]}, "x")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    shown = axes.get_images()[0].get_array()
    side = silhouettes.pixels.shape[1]
    np.testing.assert_array_equal(shown[:side, -side:], silhouettes.pixels[2].squeeze(-1))
    assert (shown[side:-side] == 255).all()


def test_samples_are_cut_apart(run: Run) -> None:
    stored = run.samples([4])[4]
    images = cut_apart(stored, run.parameters.image_size)
    np.testing.assert_array_equal(image_grid(images), stored)


def test_every_figure_says_what_it_shows(run: Run) -> None:
    figure = plots.plot_samples(run, [1, 4])
    _, metadata = figure._repr_mimebundle_()
    alt = metadata["image/png"]["alt"]
    assert alt == "the same latent vectors by epoch, normalisation undone; epoch 1; epoch 4"


def test_losses_of_the_chosen_epochs_only(run: Run) -> None:
    axes = plots.plot_losses(run.records(), [2]).axes[0]
    assert "epoch 2" in axes.get_title()
    assert len(axes.get_lines()) == 4
    for line in axes.get_lines():
        assert list(line.get_xdata()) == [4, 5, 6]


def test_smoothing_is_a_running_mean(run: Run) -> None:
    pale, smooth = plots.plot_losses(run.records(), smooth=3, losses=["loss_g"]).axes[0].get_lines()
    values = np.asarray(pale.get_ydata())
    assert smooth.get_ydata()[5] == pytest.approx(values[4:7].mean())


def test_forgetting_to_denormalise_darkens(silhouettes: ImageSet) -> None:
    left, right = plots.plot_without_denormalising(silhouettes.pixels[:16]).axes
    shown = [axes.get_images()[0].get_array().astype(int) for axes in (left, right)]
    assert (shown[1] <= shown[0]).all()
    assert shown[1].mean() < shown[0].mean()


def test_animation_of_the_samples(run: Run) -> None:
    gif = Image.open(io.BytesIO(plots.animate_samples(run, frames=3, width=128).data))
    assert gif.n_frames == 3
    assert gif.size == (128, 128 + 22)  # and a strip for the number of the epoch
    strips = [np.asarray(page.convert("L"))[:22] for page in ImageSequence.Iterator(gif)]
    assert all(strip.min() < 100 for strip in strips)
    assert not np.array_equal(strips[0], strips[2])
    assert gif.info["loop"] == 0


def test_walk_begins_and_ends_at_latent_vectors(run: Run) -> None:
    generator = run.generator()
    way = latent_walk(generator, stops=3, steps=4, seed=1)
    ends = render(generator, latent_vectors(3, generator.nz, 1))
    assert way.shape == (8, 16, 16, 1)
    for position, end in ((0, 0), (3, 1), (4, 1), (7, 2)):
        assert np.abs(way[position].astype(int) - ends[end].astype(int)).max() <= 1
    assert not np.array_equal(way[0], way[1])


def test_source_is_shown_as_it_is() -> None:
    shown = plots.show_source(epoch_shares, ImageSet)
    assert inspect.getsource(epoch_shares).rstrip() in shown.data
    assert "class ImageSet" in shown.data


def test_the_clock_shows_what_was_done_twice(run: Run) -> None:
    records = run.records()
    again = records.iloc[-2:].assign(time=records["time"].iloc[-2:] - 1.0)
    figure = plots.plot_clock(run, pd.concat([records, again]), {"killed": records["time"].min()})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["done, and done again: 2 records"].get_xdata().size == 2
    assert list(lines["killed"].get_xdata()) == [0.0, 0.0]
    steps = run.info()["steps_per_epoch"]
    checkpoints = [steps * epoch for epoch in run.epochs("checkpoints")]
    assert list(lines["checkpoint"].get_ydata()) == checkpoints != []


def test_calls_lie_on_the_row_of_their_worker() -> None:
    (axes,) = plots.plot_task_stream(TASKS).axes
    bars = [(bar.get_x(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches]
    assert sorted(bars) == [(0.0, 0), (1.0, 1), (2.0, 0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 0", "worker 1"]


def test_names_are_no_formulas(run: Run, silhouettes: ImageSet) -> None:
    name = r"$1_000 \dogs$ & $"
    named = replace(silhouettes, classes=(name,), source=name)
    figures = [
        plots.plot_images(named.pixels[:2], name, labels=[name, name]),
        plots.plot_images(named.pixels[:2], name),
        plots.plot_images_per_class(named),
        plots.plot_comparison({name: run.records(), f"{name} again": run.records()}),
        plots.plot_bars({name: 1.0, "other": 2.0}, name, name),
        plots.plot_bars({name: 1.0, "other": 2000.0}, name, name),
        plots.plot_shares(epoch_shares(96, 32, 2, 0, 1), name),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
        texts = [text for text in figure.findobj(Text) if name in text.get_text()]
        assert texts
        assert not any(text.get_parse_math() for text in texts)
    ticks = [label.get_text() for label in figures[5].axes[0].get_yticklabels()]
    assert "1,000" in ticks
    assert not any("$" in tick for tick in ticks)


def test_losses_that_run_away_are_shown_by_powers_of_ten(run: Run) -> None:
    away = run.records().assign(loss_g=lambda table: 2.0 ** table["iteration"])
    (axes,) = plots.plot_comparison({"away": away}, "loss_g", smooth=1, log=True).axes
    axes.figure.savefig(io.BytesIO(), format="png")
    assert axes.get_yscale() == "log"
    assert "logarithmic" in axes.get_ylabel()
    ticks = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert "100" in ticks
    assert not any("$" in tick for tick in ticks)


def test_bars_that_differ_hundredfold_are_all_seen() -> None:
    close = plots.plot_bars({"a": 53, "b": 1689}, "speed", "images/s").axes[0]
    assert close.get_yscale() == "linear"
    far = plots.plot_bars({"a": 53, "b": 1_700_000}, "speed", "images/s").axes[0]
    assert far.get_yscale() == "log"
    assert far.get_ylim()[0] == 1
    assert "logarithmic" in far.get_ylabel()
    ideal = plots.plot_bars({"1": 10, "2": 15}, "speed", "images/s", {"2": 20}).axes[0]
    assert ideal.get_ylim()[1] > 20
    assert ideal.get_legend_handles_labels()[1] == ["ideal"]
    nothing = plots.plot_bars({"a": 0, "b": 518}, "how often", "images").axes[0]
    assert nothing.get_yscale() == "linear"
