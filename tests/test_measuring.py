"""How good a run is: measured while it trains, or afterwards; the best epoch; its own end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

from gan_lib.base.errors import ParameterError, RunError
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.drawing import render
from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.quality.features import EfficientNetLite0, features_of
from gan_lib.results.files import SCORES
from gan_lib.results.quality import keep_quality, no_longer_better, read_quality
from gan_lib.results.run import Run, open_run
from gan_lib.results.writing import RunWriter
from gan_lib.training.measuring import Measuring, _real_features
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import Ranks


@pytest.fixture(scope="module")
def measured(tiny: TrainingParameters) -> TrainingParameters:
    """Measured after every epoch, with one checkpoint at the end."""
    told = {"quality_every": 1, "quality_images": 40, "checkpoint_every": 9, "keep_checkpoints": 1}
    # So fast that it gets better at first, and worse then.
    return tiny.replace(**told, lr_g=0.02, lr_d=0.002, real_label=0.9)


@pytest.fixture(scope="module")
def run(measured: TrainingParameters, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = str(tmp_path_factory.mktemp("measured") / "run")
    result = train_gan(measured, run=place)
    assert result.quality == open_run(place).quality()
    return open_run(place)


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: line[name] for name in line if name != "time"} for line in lines]


def test_each_measured_epoch_has_a_line(run: Run) -> None:
    lines = run.quality()
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["iteration"] for line in lines] == [3, 6, 9, 12]
    assert [line["images_seen"] for line in lines] == [96, 192, 288, 384]
    for line in lines:
        assert (line["images"], line["network"]) == (40, "efficientnet-lite0")
        assert line["kid"] > line["kid_floor"] + line["kid_spread"]
    assert len({line["fd_floor"] for line in lines}) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{run.url}/tensorboard")
    events.Reload()
    scalars = events.Scalars("kid")
    assert [event.step for event in scalars] == [3, 6, 9, 12]
    assert [event.value for event in scalars] == pytest.approx([line["kid"] for line in lines])


def test_the_best_epoch_is_kept(run: Run) -> None:
    kids = [line["kid"] for line in run.quality()]
    best = 1 + kids.index(min(kids))
    assert run.best_epoch() == best
    assert sorted(run.checkpoints()) == sorted({best, 4})
    assert run.checkpoint("best")["epoch"] == best
    z = torch.ones(1, run.parameters.nz)
    np.testing.assert_array_equal(render(run.generator("best"), z), render(run.generator(best), z))
    np.testing.assert_array_equal(run.generate(2, "best"), run.generate(2, best))
    assert list(run.samples(["best"])) == [best]


def test_a_run_is_measured_afterwards_as_while_it_trained(run: Run) -> None:
    before = run.quality()
    (again,) = run.measure(["best"], progress=False)
    assert [line["epoch"] for line in run.quality()] == [1, 2, 3, 4]
    assert again in run.quality()
    (old,) = (line for line in before if line["epoch"] == again["epoch"])
    for name in SCORES:
        assert again[name] == pytest.approx(old[name], rel=1e-3)
        assert again[f"{name}_floor"] == pytest.approx(old[f"{name}_floor"], rel=1e-3)


def test_lines_of_another_network_stand_apart(run: Run) -> None:
    class Colours(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, ::4, ::4].flatten(1).float() / 255

    from gan_lib.results.quality_plots import plot_quality

    before, best = run.quality(), run.best_epoch()
    lines = run.measure([4], n=16, network=Colours(), progress=False)
    assert run.quality("Colours") == lines
    assert lines[0]["images"] == 16
    assert (run.quality(), run.best_epoch()) == (before, best)
    assert "Colours" in plot_quality(run, "Colours").axes[0].get_title()


def test_the_command_prints_a_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from gan_lib.__main__ import main

    assert main(["measure", run.url, "--epoch", "4", "--images", "40"]) == 0
    table = capsys.readouterr().out.split("efficientnet-lite0:\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["epoch", "1", "2", "3", "4", "real"]
    (best,) = (line for line in table if line.endswith(" best"))
    assert int(best.split()[0]) == run.best_epoch()
    assert main(["measure", run.url, "--epoch", "17"]) == 2
    assert "no checkpoint of epoch 17" in capsys.readouterr().err


def test_the_curve_names_floor_choice_and_network(run: Run) -> None:
    from gan_lib.results.quality_plots import plot_quality

    (axes,) = plot_quality(run).axes
    assert "efficientnet-lite0" in axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "KID: lower is better")
    legend = axes.get_legend()
    assert legend is not None
    words = " ".join(text.get_text() for text in legend.get_texts())
    assert "floor" in words
    assert f"epoch {run.best_epoch()}" in words


def test_what_was_not_measured_is_told_so(tiny: TrainingParameters, tmp_path: Path) -> None:
    from gan_lib.results.quality_plots import plot_quality

    train_gan(tiny.replace(epochs=1), run=str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    assert run.quality() == []
    asks: list[Callable[[], Any]] = [run.best_epoch, lambda: run.generator("best")]
    for ask in asks:
        with pytest.raises(RunError, match=r"was measured: call measure\(\)"):
            ask()
    with pytest.raises(RunError, match="not measured yet"):
        plot_quality(run)


def test_too_few_images_to_measure(tiny: TrainingParameters, tmp_path: Path) -> None:
    few = tiny.replace(max_images=12, batch_size=12, quality_every=1)
    with pytest.raises(ParameterError, match="quality_every is 1, and there are 12 images"):
        train_gan(few, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_epoch_that_is_trained_again_is_measured_once(
    measured: TrainingParameters, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    told = measured.replace(checkpoint_every=1, keep_checkpoints=0, epochs=3)
    train_gan(told, run=str(place))
    before = open_run(str(place)).quality()
    # As if it had been killed after epoch 1; and somebody had measured what is no more.
    for epoch in (2, 3):
        (place / f"checkpoints/epoch_{epoch:04d}.pt").unlink()
    later = before[-1] | {"epoch": 7}
    keep_quality(RunWriter(str(place)), [later])
    result = train_gan(told, run=str(place), resume=True)
    assert result.epochs == 2
    after = open_run(str(place)).quality()
    assert without_time(after) == without_time(before)
    assert without_time(result.quality) == without_time(before)


# The ranks import this file: what they do not need, and what takes long, is imported where it is
# used.
def measured_by_ranks(p: TrainingParameters, images: ImageSet) -> Any:
    """The real features and the measure of untrained networks, as each rank has them."""
    ranks = Ranks()
    training = Training(p, ranks, torch.device("cpu"))
    network = EfficientNetLite0()
    features = _real_features(ranks, images, network, show=False)
    measuring = Measuring(training, images, network, [], show=False)
    return features, measuring.measure()


def test_ranks_measure_together_what_one_measures(
    client: Client, measured: TrainingParameters
) -> None:
    # Images that nobody has looked at before: three batches of them, for two ranks.
    pixels = np.random.default_rng(0).integers(0, 255, (70, 16, 16, 1), dtype=np.uint8)
    images = ImageSet(pixels, np.zeros(70, np.int64), ("noise",))
    (features, first), (_, second) = run_ranks(client, measured_by_ranks, p=measured, images=images)
    assert torch.equal(features, features_of(pixels, EfficientNetLite0()))
    assert first == second
    _, alone = measured_by_ranks(measured, images)
    for name in (*SCORES, "kid_spread", "kid_floor", "fd_floor"):
        assert first[name] == pytest.approx(alone[name], rel=1e-3), name


def test_a_run_that_no_longer_gets_better_ends(
    measured: TrainingParameters, tmp_path: Path, client: Client
) -> None:
    place = str(tmp_path / "run")
    # What hardly learns does not get better.
    told = measured.replace(epochs=9, patience=2, lr_g=1e-9, lr_d=1e-9)
    result = train_gan(told, run=place)
    run = open_run(place)
    assert (result.epochs, result.stopped, run.status().state) == (3, False, "finished")
    assert run.status().reason == result.reason
    assert "in 2 measurements KID has not fallen below that of epoch 1" in result.reason
    assert run.best_epoch() in run.checkpoints()
    assert sorted({run.best_epoch(), 3}) == sorted(run.checkpoints())
    # It goes on only for somebody who has more patience.
    goes_on: list[Callable[[], Any]] = [
        lambda: train_gan(told.replace(epochs=12), run=place, resume=True),
        lambda: run.resume(client, epochs=12),
    ]
    for ask in goes_on:
        with pytest.raises(RunError, match=r"not worth going on with: in 2 .* more patience, or 0"):
            ask()
    result = train_gan(told.replace(patience=3), run=place, resume=True)
    assert (result.epochs, len(run.quality())) == (1, 4)
    result = train_gan(told.replace(patience=0, epochs=5), run=place, resume=True)
    assert (result.epochs, result.reason, run.status().reason) == (1, "", "")
    assert [line["epoch"] for line in run.quality()] == [1, 2, 3, 4, 5]


def test_only_a_gain_beyond_noise_is_one() -> None:
    def ends(*kids: float, patience: int = 2) -> bool:
        lines = [
            {"epoch": i, "kid": kid, "kid_spread": 0.1, "network": "x"}
            for i, kid in enumerate(kids, 1)
        ]
        return bool(no_longer_better(lines, patience))

    assert not ends()
    assert not ends(2.0, 1.8, 1.6, 1.4)
    assert ends(2.0, 1.95, 1.98)
    # What is too little by itself adds up.
    assert not ends(2.0, 1.95, 1.85, 1.8, 1.7)
    assert ends(2.0, 1.5, 1.7, 1.9)
    assert not ends(2.0, 1.5, 1.7, 1.3)
    assert not ends(2.0, 2.0, 2.0, 2.0, patience=0)


def test_lines_are_kept_in_order(tmp_path: Path) -> None:
    folder = RunWriter(str(tmp_path))
    line: dict[str, Any] = {"iteration": 1, "images_seen": 1, "images": 9, "kid_spread": 0.1}
    line |= {f"{name}{end}": 1.0 for name in SCORES for end in ("", "_floor")} | {"network": "x"}
    for epoch in (5, 3, 4, 3):
        keep_quality(folder, [line | {"epoch": epoch}])
    assert [found["epoch"] for found in read_quality(folder)] == [3, 4, 5]
    keep_quality(folder, [], until=3)
    assert json.loads((tmp_path / "quality.jsonl").read_text())["epoch"] == 3
