from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from folders import add_greys
from gradients import gradients
from torch import nn

from gan_lib.base.errors import DivergenceError, ParameterError, RunError
from gan_lib.data.batches import Batch, Batches
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.gan.losses import gan_loss
from gan_lib.gan.models import Discriminator, Generator
from gan_lib.gan.steps import Lesson, discriminator_step, generator_step
from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training import background, rank, ranks, stopwatch
from gan_lib.training.joint import JointStep
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import Ranks, distribute, speed_of_bfloat16
from gan_lib.training.stopwatch import PARTS, Stopwatch


def test_records_say_how_long_a_step_waits_for_data(
    tiny: TrainingParameters, silhouettes: ImageSet
) -> None:
    records = train_gan(tiny, images=silhouettes, progress=False).records
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    assert any(record["data_wait"] > 0 for record in records)


def test_records_say_how_fast_it_goes_now(tiny: TrainingParameters, silhouettes: ImageSet) -> None:
    watch = Stopwatch()

    def slow_at_first() -> Iterator[Batch]:
        for pause, batch in zip((0.5, 0.0, 0.0), Batches(silhouettes, tiny).epoch(1), strict=True):
            time.sleep(pause)
            yield batch

    first, *others = [watch.record() for _ in watch.over(slow_at_first())]
    assert first["images_per_second"] <= 32 / 0.5
    assert all(record["images_per_second"] > watch.rate() for record in others)


def test_records_say_where_the_time_goes(tiny: TrainingParameters, silhouettes: ImageSet) -> None:
    records = train_gan(tiny, images=silhouettes, progress=False).records
    for before, record in pairwise(records):
        parts = [record[f"seconds_{part}"] for part in PARTS]
        assert record["seconds_step"] > 0
        assert sum(parts) <= record["time"] - before["time"] + 0.01


def test_a_run_that_spends_too_much_beside_its_steps_says_on_what(
    tmp_path: Path,
    tiny: TrainingParameters,
    silhouettes: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_gan(tiny, images=silhouettes, progress=True)
    assert "beside the steps" not in capsys.readouterr().out
    monkeypatch.setattr(stopwatch, "SECONDS_WORTH_A_NOTE", 0.0)
    monkeypatch.setattr(Training, "check_weights", lambda self: time.sleep(0.5))
    place = str(tmp_path / "run")
    train_gan(tiny, run=place, images=silhouettes, progress=True)
    said = r"of the time went beside the steps: \d+% on keeping records, pictures and checkpoints"
    assert re.search(said, capsys.readouterr().out)
    open_run(place).watch()
    assert re.search(said, capsys.readouterr().out)


def test_gan_loss_is_the_published_one() -> None:
    scores = torch.tensor([-1.5, 0.3, 2.0])
    d = torch.sigmoid(scores)
    assert gan_loss(scores, 1.0).item() == pytest.approx(-d.log().mean().item())
    assert gan_loss(scores, 0.0).item() == pytest.approx(-(1 - d).log().mean().item())
    # With label 0.5 no score does better than log 2.
    assert gan_loss(torch.zeros(3), 0.5).item() == pytest.approx(math.log(2))


def test_each_step_teaches_one_network_only() -> None:
    torch.manual_seed(0)
    g, d = Generator(16, 1, nz=8, ngf=4), Discriminator(16, 1, ndf=4)
    optimizer_g, optimizer_d = (torch.optim.Adam(m.parameters()) for m in (g, d))
    real, fake = torch.randn(8, 1, 16, 16), g(torch.randn(8, 8))

    before = _weights(g), _weights(d)
    losses = discriminator_step(d, optimizer_d, real, fake, Lesson())
    assert losses["loss_d"] == losses["loss_d_real"] + losses["loss_d_fake"]
    assert torch.equal(_weights(g), before[0])
    assert not torch.equal(_weights(d), before[1])
    assert all(p.grad is None for p in g.parameters())

    before = _weights(g), _weights(d)
    for p in d.parameters():
        p.grad = None
    generator_step(d, optimizer_g, real, fake, Lesson())
    assert not torch.equal(_weights(g), before[0])
    assert torch.equal(_weights(d), before[1])
    # Frozen: no work is spent on gradients that nobody uses.
    assert all(p.grad is None for p in d.parameters())


def _weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


@pytest.mark.parametrize("batch", [8, 7])
def test_two_ranks_have_the_gradient_of_one(client: Client, batch: int) -> None:
    alone = gradients({}, batch)
    first, second = run_ranks(client, gradients, part={}, batch=batch)
    assert min(g.abs().max() for g in alone) > 1e-4
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-4, atol=1e-8)


def test_training_in_one_process(tmp_path: Path, tiny: TrainingParameters) -> None:
    result = train_gan(tiny, run=str(tmp_path / "run"))
    assert (result.world_size, result.iterations, result.epochs) == (1, 12, 4)
    assert [r["iteration"] for r in result.records] == list(range(1, 13))
    assert [r["epoch"] for r in result.records] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert result.generator is not None
    run = open_run(str(tmp_path / "run"))
    assert run.parameters == tiny
    assert run.status().state == "finished"
    assert run.records()["loss_g"].tolist() == [r["loss_g"] for r in result.records]
    assert sorted(run.samples()) == [1, 2, 3, 4]
    assert sorted(run.checkpoints()) == [2, 4]


def test_defaults_for_everything() -> None:
    parameters = {"image_size": 16, "channels": 1, "ngf": 4, "ndf": 4, "epochs": 1}
    result = train_gan(parameters, images=prepare_images("dog-silhouettes", 16, 1, max_images=128))
    assert result.iterations == 1
    assert result.run is None


def test_same_seed_same_weights(tiny: TrainingParameters) -> None:
    first, second = train_gan(tiny), train_gan(tiny)
    assert first.weights_sha256 == second.weights_sha256
    assert train_gan(tiny.replace(seed=1)).weights_sha256 != first.weights_sha256


def test_recording_less_often(tiny: TrainingParameters) -> None:
    often, seldom = train_gan(tiny), train_gan(tiny.replace(record_every=5))
    assert [r["iteration"] for r in seldom.records] == [5, 10]
    # What is recorded does not change what is trained.
    assert often.weights_sha256 == seldom.weights_sha256
    assert often.records[4]["loss_d"] == seldom.records[0]["loss_d"]


def test_bfloat16_is_close_to_float32(tiny: TrainingParameters) -> None:
    exact = train_gan(tiny).records[0]
    rounded = train_gan(tiny.replace(precision="bfloat16")).records[0]
    assert rounded["loss_d"] != exact["loss_d"]
    assert rounded["loss_d"] == pytest.approx(exact["loss_d"], rel=0.02)


def test_auto_takes_what_the_hardware_computes_in(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    auto = train_gan(tiny.replace(precision="auto", device="cpu"), run=place)
    taken = open_run(place).info()["precision_taken"]
    assert taken == (
        "bfloat16" if speed_of_bfloat16(torch.device("cpu")) == "faster" else "float32"
    )
    assert (
        auto.weights_sha256 == train_gan(tiny.replace(precision=taken, device="cpu")).weights_sha256
    )


def test_bfloat16_that_is_emulated_is_told(
    tmp_path: Path,
    tiny: TrainingParameters,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ranks, "speed_of_bfloat16", lambda device: "emulated")
    place = str(tmp_path / "run")
    with pytest.warns(UserWarning, match="emulated, .* Take auto or float32"):
        train_gan(tiny.replace(precision="bfloat16", epochs=1), run=place)
    open_run(place).watch()
    assert "note: precision is bfloat16" in capsys.readouterr().out


def means(shape: tuple[int, ...], told: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the mean of ones and twos is right, and leaves what this rank has."""
    alone = not Ranks().distributed
    layer = nn.Linear(2, 2) if alone else distribute(nn.Linear(2, 2))
    step = JointStep(torch.optim.SGD(layer.parameters()), layer, **told)
    own = torch.full(shape, 1.0 + Ranks().rank)
    mine = own.clone()
    mean = step.mean(mine)
    return torch.equal(mean, torch.full(shape, 1.0 if alone else 1.5)), torch.equal(mine, own)


@pytest.mark.parametrize(
    ("shape", "told"),
    [((2, 3), {}), ((300, 3), {}), ((2, 3), {"exchange": "bfloat16"})],
    ids=["in shared memory", "too much for it", "by messages"],
)
def test_the_mean_over_the_ranks_leaves_what_each_rank_has(
    client: Client, shape: tuple[int, ...], told: dict[str, Any]
) -> None:
    assert means(shape, told) == (True, True)
    assert run_ranks(client, means, device="cpu", shape=shape, told=told) == [(True, True)] * 2


def precision_with_one_slow_rank(parameters: TrainingParameters, run: str) -> str:
    from unittest.mock import patch

    import torch.distributed as dist

    speeds = ("faster", "slower")
    with patch.object(ranks, "speed_of_bfloat16", lambda device: speeds[dist.get_rank()]):
        return train_gan(parameters, run=run).weights_sha256


def test_ranks_agree_on_a_precision(
    client: Client, tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = str(tmp_path / "run")
    auto = tiny.replace(precision="auto", epochs=1)
    first, second = run_ranks(client, precision_with_one_slow_rank, parameters=auto, run=place)
    assert first == second
    assert open_run(place).info()["precision_taken"] == "float32"


def on_devices_of_two_kinds(parameters: TrainingParameters) -> None:
    from unittest.mock import patch

    import torch.distributed as dist

    kinds = torch.device("cpu"), torch.device("meta")
    with patch.object(rank, "pick_device", lambda *_: kinds[dist.get_rank()]):
        train_gan(parameters)


def test_a_rank_without_a_gpu_beside_ranks_with_one_is_refused(
    client: Client, tiny: TrainingParameters
) -> None:
    told = tiny.replace(source="/nowhere")  # before any image is read
    with pytest.raises(ParameterError, match=r"devices .* of rank 1 differ .* device to 'cpu'"):
        run_ranks(client, on_devices_of_two_kinds, device="cpu", parameters=told)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_resume_is_bit_identical(tmp_path: Path, tiny: TrainingParameters, precision: str) -> None:
    tiny = tiny.replace(precision=precision)
    whole = train_gan(tiny, run=str(tmp_path / "whole"))
    half = str(tmp_path / "half")
    train_gan(tiny.replace(epochs=2), run=half)
    rest = train_gan(tiny, run=half, resume=True)
    assert (rest.epochs, rest.iterations) == (2, 6)
    assert rest.weights_sha256 == whole.weights_sha256
    assert open_run(half).records()["iteration"].tolist() == list(range(1, 13))


def test_stop_and_go_on(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = tmp_path / "run"

    class AsksBeforeTheSecondEpoch:
        def submit_result(self, path: str, data: str | bytes) -> None:
            if path.endswith("epoch_0001.jsonl"):
                (place / "stop").write_bytes(b"")

    result = train_gan(tiny, run=str(place), results=AsksBeforeTheSecondEpoch())
    run = open_run(str(place))
    assert result.stopped
    assert run.epochs("records") == [1, 2]
    assert run.status().state == "stopped"
    assert 2 in run.checkpoints()
    again = train_gan(tiny, run=str(place), resume=True)
    assert not again.stopped
    assert run.epochs("records") == [1, 2, 3, 4]
    assert again.weights_sha256 == train_gan(tiny).weights_sha256


def test_a_stop_is_asked_for_until_its_checkpoint_is_written(
    tmp_path: Path, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PAUSES", (0.01,))
    place = tmp_path / "run"

    class AsksWhereNoCheckpointCanBeWritten:
        def submit_result(self, path: str, data: str | bytes) -> None:
            if path.endswith("epoch_0001.jsonl"):
                (place / "stop").write_bytes(b"")
                (place / "checkpoints").write_bytes(b"in the way of a folder")

    with pytest.raises(OSError, match="checkpoints"):
        train_gan(tiny, run=str(place), results=AsksWhereNoCheckpointCanBeWritten())
    assert (place / "stop").exists()
    assert open_run(str(place)).status().state == "training"


def test_a_request_of_the_supervisor_is_no_request_of_a_person(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = tmp_path / "run"

    class AsksForBoth:
        def submit_result(self, path: str, data: str | bytes) -> None:
            if path.endswith("epoch_0001.jsonl"):
                (place / "stop").write_bytes(b"epoch")
                (place / "regroup").write_bytes(b"")

    result = train_gan(tiny, run=str(place), results=AsksForBoth())
    assert (result.asked, open_run(str(place)).status().state) == ("epoch", "stopped")
    assert not {"stop", "regroup"} & {path.name for path in place.iterdir()}
    # What is left of attempts that were killed asks nothing of the next.
    for name in ("stop", "regroup"):
        (place / name).write_bytes(b"")
    again = train_gan(tiny, run=str(place), resume=True)
    assert (again.epochs, again.stopped) == (2, False)
    assert not {"stop", "regroup"} & {path.name for path in place.iterdir()}


def test_resuming_to_an_end_that_is_past_is_refused(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny, run=place)
    with pytest.raises(RunError, match=r"epochs is 2, and the newest checkpoint .* of epoch 4"):
        train_gan(tiny.replace(epochs=2), run=place, resume=True)
    assert open_run(place).status().state == "finished"
    # To the same end it may be told to go on: it could have been killed just before.
    assert train_gan(tiny, run=place, resume=True).epochs == 0
    assert open_run(place).status().state == "finished"


def test_resuming_with_other_images_is_refused(tmp_path: Path, tiny: TrainingParameters) -> None:
    source, place = tmp_path / "images", str(tmp_path / "run")
    add_greys(source, range(20))
    told = tiny.replace(source=str(source), max_images=0, batch_size=10)
    train_gan(told, run=place)
    add_greys(source, range(20, 22))
    before = {path: path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"on 20 images, and the 22 .*new_images=True"):
        train_gan(told.replace(epochs=5), run=place, resume=True)
    assert {p: p.read_bytes() for p in Path(place).rglob("*") if p.is_file()} == before
    train_gan(told.replace(epochs=5), run=place, resume=True, new_images=True)
    assert open_run(place).info()["images"] == 22
    # These are now its images.
    train_gan(told.replace(epochs=6), run=place, resume=True)


def test_a_run_of_before_is_resumed(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = tmp_path / "run"
    train_gan(tiny.replace(epochs=2), run=str(place))
    info = json.loads((place / "parameters.json").read_text())
    del info["images_sha256"]
    (place / "parameters.json").write_text(json.dumps(info))
    assert train_gan(tiny, run=str(place), resume=True).epochs == 2


def test_a_run_is_never_overwritten(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=1), run=place)
    before = {p: p.read_bytes() for p in Path(place).rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="already holds a run"):
        train_gan(tiny, run=place)
    assert {p: p.read_bytes() for p in Path(place).rglob("*") if p.is_file()} == before


def test_resume_with_other_parameters_is_refused(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=1), run=place)
    with pytest.raises(RunError, match=r"lr_g was 0\.0002 and is 0\.1") as caught:
        train_gan(tiny.replace(lr_g=0.1, nz=8), run=place, resume=True)
    assert "nz was 16 and is 8" in str(caught.value)
    with pytest.raises(RunError, match="no run lives"):
        train_gan(tiny, run=str(tmp_path / "nowhere"), resume=True)


def test_old_checkpoints_are_deleted(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=5, checkpoint_every=1, keep_checkpoints=2), run=place)
    assert sorted(open_run(place).checkpoints()) == [4, 5]


def test_divergence_is_an_error_with_a_cure(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    wild = tiny.replace(lr_g=1e30, lr_d=1e30)
    with pytest.raises(DivergenceError, match=r"loss_.* is .* at iteration \d+.*lower lr_g"):
        train_gan(wild, run=place)
    assert open_run(place).status().state == "failed"
    assert "diverged" in open_run(place).status().error


def test_images_of_another_size_are_refused(
    silhouettes: ImageSet, tiny: TrainingParameters
) -> None:
    with pytest.raises(ParameterError, match="image_size"):
        train_gan(tiny.replace(image_size=32), images=silhouettes)


def test_cuda_without_a_gpu_is_one_sentence(tiny: TrainingParameters) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ParameterError, match="no GPU"):
        train_gan(tiny.replace(device="cuda"))
