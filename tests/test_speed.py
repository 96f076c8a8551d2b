"""What is there for speed alone: what is learnt stays the same."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from distributed import Client
from gradients import gradients
from torch._dynamo.utils import counters

from gan_lib.base.errors import ParameterError
from gan_lib.base.weights import weights_checksum
from gan_lib.data.batches import Batches
from gan_lib.data.image_set import ImageSet
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training import ranks
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import Ranks, pick_compile

# Each part of a recipe that changes what is compiled.
ALL_BUT_R1 = {
    "loss": "relativistic", "d_norm": "spectral", "augment": "translation,cutout,color",
    "conditional": True, "ema_images": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    "recipe", [{}, pytest.param(ALL_BUT_R1, marks=pytest.mark.long)], ids=["plain", "all but r1"]
)
def test_what_is_compiled_trains_alike_and_is_resumed_to_the_bit(
    tmp_path: Path, tiny: TrainingParameters, silhouettes: ImageSet, recipe: dict[str, object]
) -> None:
    place = str(tmp_path / "run")
    told = tiny.replace(**recipe, compile="on", epochs=2)
    plain = train_gan(told.replace(compile="off"), images=silhouettes)
    counters.clear()
    # All of torch.compile but its last stage, which takes a compiler and a minute.
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        whole = train_gan(told, images=silhouettes)
        train_gan(told.replace(epochs=1), run=place, images=silhouettes)
        rest = train_gan(told, run=place, images=silhouettes, resume=True)
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["graph_break"]
    assert rest.weights_sha256 == whole.weights_sha256
    for one, other in zip(plain.records, whole.records, strict=True):
        assert one["loss_d"] == pytest.approx(other["loss_d"], rel=1e-3)
        assert one["loss_g"] == pytest.approx(other["loss_g"], rel=1e-3)
    assert open_run(place).info()["compiled"]
    # Everything has its name, and whoever gets the generator gets it as it was written.
    state = open_run(place).checkpoint()
    assert state["generator"].keys() == whole.generator.state_dict().keys()
    assert whole.generator._compiled_call_impl is None


@pytest.mark.long
def test_replicas_stay_equal_when_each_rank_compiles(
    client: Client, tiny: TrainingParameters, silhouettes: ImageSet
) -> None:
    told = tiny.replace(compile="on", epochs=1).to_dict()
    first, second = run_ranks(
        client, train_gan, parameters=told, images=silhouettes, progress=False
    )
    assert first.weights_sha256 == second.weights_sha256
    (plain,) = run_ranks(
        client, train_gan, 1, parameters=told | {"compile": "off"}, images=silhouettes
    )
    # Beside the compiled ranks only BatchNorm differs, which sees half of the images.
    assert first.records[-1]["loss_d"] == pytest.approx(plain.records[-1]["loss_d"], rel=0.05)


def test_auto_compiles_long_runs_on_gpus_alone(
    tmp_path: Path, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto, many = tiny.replace(compile="auto"), ranks.STEPS_WORTH_COMPILING
    assert not pick_compile(auto.replace(device="cpu"), Ranks(), many, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert not pick_compile(auto, Ranks(), many, None)
    (tmp_path / "Python.h").touch()
    assert pick_compile(auto, Ranks(), many, None)
    assert not pick_compile(auto, Ranks(), many - 1, None)
    # A run goes on as it began, also if it is told other epochs.
    assert pick_compile(auto, Ranks(), many - 1, True)
    assert not pick_compile(auto, Ranks(), many, False)
    assert not pick_compile(auto.replace(r1=1.0, d_norm="none"), Ranks(), many, None)
    assert not pick_compile(auto.replace(sync_norm=True), Ranks(), many, None)
    monkeypatch.setenv("PATH", "")
    assert not pick_compile(auto, Ranks(), many, None)


def test_what_this_machine_cannot_do_is_said_before_anything_is_read(
    client: Client, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    told = tiny.replace(sync_norm=True)
    with pytest.raises(ParameterError, match="sync_norm is True, and here is no GPU"):
        train_gan(told.replace(source="/nowhere"))
    with pytest.raises(ParameterError, match=r"no GPU: .* \(that was the worker t"):
        launch(client, told)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ParameterError, match="here is no compiler: install g"):
        train_gan(tiny.replace(compile="on", source="/nowhere"))
    for other in ({"r1": 1.0, "d_norm": "none"}, {"sync_norm": True}):
        with pytest.raises(ParameterError, match="torch cannot compile that"):
            tiny.replace(compile="on", **other)


def test_batchnorm_over_all_ranks_keeps_every_name(tiny: TrainingParameters) -> None:
    told = tiny.replace(conditional=True)
    classes = {"dog": 96}
    one, other = (
        Training(told.replace(sync_norm=on), Ranks(), torch.device("cpu"), classes)
        for on in (False, True)
    )
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in other.d.modules()) == 1
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in other.g.modules()) == 2
    other.load(one.state())
    assert (other.draw() == one.draw()).all()


def some_steps(p: TrainingParameters, images: ImageSet, late: bool) -> tuple[str, bool]:
    """On a rank: the weights after some steps, and whether the first changed the generator."""
    ranks = Ranks()
    training = Training(p, ranks, torch.device("cpu"))
    weight = next(training.generator.parameters())
    before, changed = weight.clone(), []
    for batch in Batches(images, p, ranks.rank, ranks.world_size, training.device).epoch(1):
        training.step(batch)
        if not late:
            training.finish()
        changed.append(not torch.equal(weight, before))
    training.finish()
    assert training.average is not None
    everything = *training.networks.values(), training.average.generator
    # BatchNorm's statistics are each rank's own until the end of the epoch.
    learnt = [dict(module.named_parameters()) for module in everything]
    return weights_checksum(*learnt), changed[0]


@pytest.mark.parametrize("exchange", ["float32", "bfloat16"])
def test_a_step_that_is_taken_late_is_the_same_step(
    client: Client, tiny: TrainingParameters, silhouettes: ImageSet, exchange: str
) -> None:
    told = tiny.replace(exchange=exchange, ema_images=50, lr_hold=32, lr_half_life=32)
    weights = []
    for late in (True, False):
        first, second = run_ranks(client, some_steps, p=told, images=silhouettes, late=late)
        assert first == second
        weights.append(first[0])
        assert first[1] is not late
    assert weights[0] == weights[1]


def test_gradients_in_half_the_bytes_are_the_same_on_all_ranks(client: Client) -> None:
    alone = gradients({"real_label": 0.9}, batch=7)
    told = {"real_label": 0.9, "exchange": "bfloat16"}
    first, second = run_ranks(client, gradients, part=told, batch=7)
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, a.bfloat16().to(a.dtype))
        assert (a - one).abs().max() < 2**-7 * one.abs().max()
