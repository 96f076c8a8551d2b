"""The parts of a recipe: losses, norms, penalties, augmentation, classes, the moving average."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from gradients import gradients
from torch import Tensor, nn

from gan_lib.base.errors import ParameterError
from gan_lib.data.batches import Batch
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.augmentation import Look, augment, numbers_for
from gan_lib.gan.averaging import MovingAverage
from gan_lib.gan.drawing import generate_images, latent_vectors
from gan_lib.gan.losses import (
    gan_loss,
    loss_of_generator,
    loss_of_pairs,
    loss_on_fake,
    loss_on_real,
)
from gan_lib.gan.models import Block, Discriminator, Generator
from gan_lib.gan.rates import rate_factor
from gan_lib.gan.steps import FAKE, REAL, Lesson, r1_penalty
from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import CHANGES, TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import Ranks

EVERYTHING = {
    "loss": "relativistic",
    "d_norm": "spectral",
    "r1": 0.1,
    "r1_every": 2,
    "augment": "translation,cutout",
    "augment_after": 100,
    "augment_late": "color",
    "augment_late_after": 200,
    "ema_images": 100,
    "conditional": True,
    "blocks": 1,
    "lr_hold": 150,
    "lr_half_life": 200,
    "color_jitter": 0.1,
    "noise": 0.1,
    "exchange": "bfloat16",
}
# What the profiles for photographs have, with a boundary that a short run crosses.
PHOTOGRAPHS = {
    "d_bias": True,
    "augment": "translation",
    "augment_after": 100,
    "augment_late": "cutout,color",
    "augment_late_after": 200,
    "real_label": 0.9,
    "blocks": 1,
    "lr_hold": 150,
    "lr_half_life": 200,
    "ema_images": 100,
}
RECIPES = {"everything": EVERYTHING, "photographs": PHOTOGRAPHS}
# Each part of the recipe alone, as a discriminator and a lesson of its own.
PARTS = {
    "hinge": {"loss": "hinge"},
    "relativistic": {"loss": "relativistic"},
    "spectral": {"d_norm": "spectral"},
    "no norm": {"d_norm": "none"},
    "r1": {"d_norm": "none", "r1": 1.0, "r1_every": 1},
    "r1 and r2": {"d_norm": "none", "r1": 1.0, "r1_every": 1, "loss": "relativistic"},
    "bias": {"d_bias": True},
    "blocks": {"blocks": 2},
    "blocks, no norm": {"blocks": 1, "d_norm": "none"},
    "blocks, spectral": {"blocks": 1, "d_norm": "spectral"},
    "augment": {"augment": "translation,cutout,color"},
    "jitter": {"color_jitter": 0.3},
    "conditional": {"conditional": True},
}


@pytest.fixture
def two_kinds(tiny: TrainingParameters) -> ImageSet:
    """Dark and light images, three to one, in two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 4 // 3
    pixels = rng.integers(60, size=(96, 16, 16, 1)) + 180 * labels[:, None, None, None]
    return ImageSet(pixels.astype(np.uint8), labels.astype(np.int64), ("dark", "light"))


def test_losses_are_the_published_ones() -> None:
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-3.0, 0.5])
    assert loss_on_real("hinge", real, 0.5).item() == pytest.approx((0.7 + 0) / 2)
    assert loss_on_fake("hinge", fake, 0.0).item() == pytest.approx((0 + 1.5) / 2)
    assert loss_of_generator("hinge", fake, 0.5).item() == pytest.approx(1.25)
    pairs = [math.log(1 + math.exp(-3.3)), math.log(1 + math.exp(-1.5))]
    assert loss_of_pairs(real, fake).item() == pytest.approx(sum(pairs) / 2)
    assert loss_on_real("bce", real, 0.9) == gan_loss(real, 0.9)


def test_the_penalty_is_the_squared_slope() -> None:
    class Slope(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 3 * images.flatten(1).sum(1)

    images = torch.randn(5, 1, 4, 4)
    assert r1_penalty(Slope(), images, Lesson(), REAL).item() == pytest.approx(9 * 16)
    # Of the images as they are, before they are changed: a half-blanked image has half the slope.
    half = Lesson(look=lambda images, turn: images * (torch.arange(4) < 2))
    assert r1_penalty(Slope(), images, half, REAL).item() == pytest.approx(9 * 8)


def test_spectral_norm_keeps_every_slope_at_one() -> None:
    torch.manual_seed(0)
    d = Discriminator(16, 3, ndf=8, norm="spectral", n_classes=5)
    labels = torch.zeros(4, dtype=torch.int64)
    for _ in range(30):
        d(torch.randn(4, 3, 16, 16), labels)
    for module in d.modules():
        if isinstance(module, nn.Conv2d | nn.Embedding):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(
                1, rel=0.05
            )


@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_images_come_through_a_discriminator_without_batchnorm(norm: str) -> None:
    torch.manual_seed(0)
    d = Discriminator(64, 3, ndf=16, norm=norm)
    light, dark = torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    assert (d(light) - d(dark)).abs().item() > 0.001


@pytest.mark.parametrize("bias", [False, True])
def test_batchnorm_hides_the_contrast_unless_the_first_layer_has_an_offset(bias: bool) -> None:
    torch.manual_seed(0)
    d = Discriminator(32, 3, ndf=32, bias=bias).train()
    images = torch.rand(32, 3, 32, 32) * 2 - 1
    whole, half = d(images), d(images / 2)
    assert torch.allclose(whole, half, atol=0.1 * whole.std().item()) is not bias


@pytest.mark.parametrize("name", CHANGES)
def test_each_image_is_changed_in_its_own_way_and_gradients_pass(name: str) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    images = image.repeat(8, 1, 1, 1).requires_grad_(True)
    numbers = numbers_for((name,), 8, seed=1)
    changed = augment(images, (name,), numbers)
    assert changed.shape == images.shape
    assert len({tuple(one.flatten().tolist()) for one in changed}) >= 5
    assert torch.equal(changed, augment(images, (name,), numbers))
    changed.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_changes_are_those_of_the_paper() -> None:
    images = torch.rand(256, 3, 16, 16) + 1  # nothing is 0
    cut = augment(images, ("cutout",), numbers_for(("cutout",), 256, seed=0))
    kept = (cut == images).all(1).float().mean((1, 2))
    assert kept.min() == 0.75
    assert ((cut == images) | (cut == 0)).all()
    moved = augment(images, ("translation",), numbers_for(("translation",), 256, seed=0))
    rows_lost = (moved == 0).all(1).all(2).sum(1)
    assert sorted(set(rows_lost.tolist())) == [0, 1, 2]  # an eighth of 16 pixels
    u = torch.tensor([[0.5, 0.5, 0.5]])  # the middle of each range changes nothing
    assert torch.allclose(augment(images, ("color",), u.expand(256, 3)), images, atol=1e-5)
    grey = augment(images, ("color",), torch.tensor([[0.5, 0.0, 0.5]]).expand(256, 3))
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)


def test_a_look_is_the_same_on_any_number_of_ranks(tiny: TrainingParameters) -> None:
    images = torch.rand(15, 3, 16, 16)
    p = tiny.replace(channels=3, augment="translation,cutout,color", color_jitter=0.3)
    whole = Look(p, 7, slice(0, 15), 15)(images, REAL)
    shares = slice(0, 8), slice(8, 15)
    parts = [Look(p, 7, s, 15, rank)(images[s], REAL) for rank, s in enumerate(shares)]
    torch.testing.assert_close(torch.cat(parts), whole)
    for other in (replace(Look(p, 7, slice(0, 15), 15), iteration=8)(images, REAL),
                  Look(p, 7, slice(0, 15), 15)(images, FAKE)):  # fmt: skip
        assert not torch.equal(other, whole)


def test_what_is_seen_is_changed_only_after_so_many_images(tiny: TrainingParameters) -> None:
    p = tiny.replace(augment="translation", augment_after=100)
    images = torch.rand(64, 1, 16, 16)
    for seen, changed in ((0, False), (99, False), (100, True)):
        look = Look(p, 0, slice(0, 64), 64, seen=seen)
        assert torch.equal(look(images, REAL), images) is not changed
    late = p.replace(augment_late="cutout,color", augment_late_after=200)
    for seen, changes in (
        (99, ()),
        (199, ("translation",)),
        (200, ("translation", "cutout", "color")),
    ):
        assert late.changes(seen) == changes
    look = Look(late, 0, slice(0, 64), 64, seen=200)
    assert not torch.equal(look(images, REAL), replace(look, seen=199)(images, REAL))
    training = Training(p.replace(batch_size=32), Ranks(), torch.device("cpu"))
    training.seen = 70
    batch = Batch(images[:32], torch.zeros(32, dtype=torch.int64), slice(0, 32), 32, 1.0)
    assert training.lesson(batch).look.seen == 70


def test_learning_rates_follow_the_images_that_were_seen(tiny: TrainingParameters) -> None:
    p = tiny.replace(lr_hold=1000, lr_half_life=500)
    factors = [rate_factor(p, seen) for seen in (0, 1000, 1500, 2000, 3500)]
    assert factors == pytest.approx([1, 1, 0.5, 0.25, 1 / 32])
    assert rate_factor(tiny, 10**9) == 1
    p = tiny.replace(lr_hold=32, lr_half_life=32, lr_g=0.1, lr_d=0.4)
    training = Training(p, Ranks(), torch.device("cpu"))
    batch = Batch(torch.rand(32, 1, 16, 16), torch.zeros(32).long(), slice(0, 32), 32, 1.0)
    for factor in (1, 1, 0.5):
        training.step(batch)
        rates = [o.param_groups[0]["lr"] for o in (training.optimizer_g, training.optimizer_d)]
        assert rates == pytest.approx([0.1 * factor, 0.4 * factor])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_blocks_begin_by_adding_nothing(norm: str) -> None:
    d = Discriminator(16, 1, ndf=4, norm=norm, blocks=2)
    blocks = [layer for layer in d.layers if isinstance(layer, Block)]
    assert len(blocks) == 4
    for block in blocks:
        x = torch.randn(8, block.convolution.in_channels, 8, 8)
        torch.testing.assert_close(block(x.clone()), nn.functional.leaky_relu(x, 0.2))
    # So a generator, whose values are above 0 there, begins as the same one without.
    plain, more = Generator(16, 1, nz=10, ngf=4), Generator(16, 1, nz=10, ngf=4, blocks=2)
    others = [layer for layer in more.layers if not isinstance(layer, Block)]
    for ours, theirs in zip(others, plain.layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    z = torch.randn(8, 10)
    torch.testing.assert_close(more(z), plain(z))
    # What knows no classes does not mind being told one.
    torch.testing.assert_close(more(z, torch.zeros(8).long()), plain(z))


def test_noise_has_the_strength_that_was_asked_for(tiny: TrainingParameters) -> None:
    look = Look(tiny.replace(noise=0.1), 0, slice(0, 64), 64)
    noisy = look(torch.zeros(64, 1, 16, 16), REAL)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy, look(torch.zeros(64, 1, 16, 16), REAL))
    assert not torch.equal(noisy, look(torch.zeros(64, 1, 16, 16), FAKE))


def test_the_moving_average_has_its_half_life() -> None:
    torch.manual_seed(0)
    g = Generator(16, 1, nz=4, ngf=4)
    average = MovingAverage(g, half_life=1000)
    before = [p.clone() for p in average.generator.parameters()]
    with torch.no_grad():
        for p in g.parameters():
            p.add_(1.0)
    for step in range(10):
        average.update(g, n=100, seen=1_000_000 + 100 * step)
    for old, new in zip(before, average.generator.parameters(), strict=True):
        torch.testing.assert_close(new - old, torch.full_like(new, 0.5))
    # At first it follows at once.
    MovingAverage(g, half_life=10_000_000).update(g, n=64, seen=64)


def test_the_mean_has_the_statistics_of_what_it_draws_itself() -> None:
    torch.manual_seed(0)
    g = Generator(16, 1, nz=4, ngf=4, classes={"dark": 3, "light": 1}).train()
    average = MovingAverage(g, half_life=100)
    for weights in g.parameters():
        weights.data.mul_(1.5)
    average.update(g, n=100, seen=10_000)
    average.find_statistics()
    drawer = copy.deepcopy(average.generator)
    z, labels = torch.randn(2048, 4), torch.multinomial(torch.tensor([3.0, 1.0]), 2048, True)
    with torch.no_grad():
        # In eval mode, what comes out of a BatchNorm has the mean and spread that it says.
        x = drawer.layers[0](z[:, :, None, None])
        out = drawer.layers[1](x, labels)
        norm = drawer.layers[1].norm
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=0.1, atol=0.02)
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=0.1, atol=0.02)
        assert torch.isfinite(out).all()
    # And the same ones each time, without a step in between or with none that changes it.
    before = [value.clone() for value in average.generator.buffers()]
    average.update(average.generator, n=100, seen=10_000)
    average.find_statistics()
    for one, other in zip(before, average.generator.buffers(), strict=True):
        assert torch.equal(one, other)


def test_the_mean_waits_for_no_other_rank(tiny: TrainingParameters) -> None:
    training = Training(tiny.replace(ema_images=100, sync_norm=True), Ranks(), torch.device("cpu"))
    asks_others = [
        [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
        for network in (training.generator, training.average.generator)
    ]
    assert asks_others[0] and not asks_others[1]
    assert training.draw().shape == (16, 16, 16, 1)


def test_what_a_run_draws_is_the_average(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    result = train_gan(tiny.replace(ema_images=1000), run=place)
    plain = train_gan(tiny)
    # It is drawn with, and changes nothing of what is trained.
    assert result.weights_sha256 == plain.weights_sha256
    state = open_run(place).checkpoint()
    weights = open_run(place).generator().state_dict()
    assert all(torch.equal(weights[name], value) for name, value in state["average"].items())
    assert any(not torch.equal(weights[n], v) for n, v in state["generator"].items())
    z = latent_vectors(2, tiny.nz, 0)
    assert torch.equal(result.generator(z), open_run(place).generator()(z))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop_inside", [False, True])
def test_resume_is_bit_identical_with_all_of_a_recipe(
    tmp_path: Path, tiny: TrainingParameters, two_kinds: ImageSet, stop_inside: bool, recipe: str
) -> None:
    told = tiny.replace(**RECIPES[recipe], checkpoint_every=1)
    whole, half = str(tmp_path / "whole"), str(tmp_path / "half")
    train_gan(told, run=whole, images=two_kinds)

    class AsksInsideTheSecondEpoch:
        def submit_result(self, path: str, data: str | bytes) -> None:
            if path.endswith("epoch_0001.jsonl"):
                (tmp_path / "half" / "stop").write_bytes(b"now")

    if stop_inside:
        train_gan(told, run=half, images=two_kinds, results=AsksInsideTheSecondEpoch())
    else:
        train_gan(told.replace(epochs=2), run=half, images=two_kinds)
    train_gan(told, run=half, images=two_kinds, resume=True)
    one, other = (open_run(place).checkpoint() for place in (whole, half))
    assert one["seen"] == other["seen"] == 4 * 96
    for network in ("generator", "discriminator", "average"):
        for name, value in one[network].items():
            assert torch.equal(value, other[network][name]), (network, name)


def gradients_of_parts(parts: dict[str, dict[str, object]], batch: int) -> dict[str, list[Tensor]]:
    return {name: gradients({"real_label": 0.9} | part, batch) for name, part in parts.items()}


def test_two_ranks_have_the_gradient_of_one_with_every_part(client: Client) -> None:
    alone = gradients_of_parts(PARTS, batch=7)
    first, second = run_ranks(client, gradients_of_parts, parts=PARTS, batch=7)
    for name in PARTS:
        for one, a, b in zip(alone[name], first[name], second[name], strict=True):
            assert one.abs().max() > 1e-9, name
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, one, rtol=1e-4, atol=1e-8, msg=name)


def replicas(parameters: dict[str, object], images: ImageSet) -> str:
    return train_gan(parameters, images=images, progress=False).weights_sha256


@pytest.mark.parametrize("recipe", RECIPES)
def test_replicas_stay_equal_with_all_of_a_recipe(
    client: Client, tiny: TrainingParameters, two_kinds: ImageSet, recipe: str
) -> None:
    told = tiny.replace(**RECIPES[recipe]).to_dict()
    first, second = run_ranks(client, replicas, parameters=told, images=two_kinds)
    assert first == second


def test_a_class_is_drawn_by_its_name(
    tmp_path: Path, tiny: TrainingParameters, two_kinds: ImageSet
) -> None:
    place = str(tmp_path / "run")
    told = tiny.replace(conditional=True, epochs=60, lr_g=3e-3, lr_d=3e-3, real_label=0.9)
    train_gan(told, run=place, images=two_kinds, progress=False)
    run = open_run(place)
    assert run.generator().classes == {"dark": 72, "light": 24}
    dark, light = (run.generate(32, of=name).mean() for name in ("dark", "ligh"))
    assert light - dark > 60
    # Unasked, as often as in the training images.
    some = run.generate(200).mean((1, 2, 3))
    assert 120 < (some < (dark + light) / 2).sum() < 180
    with pytest.raises(ParameterError, match=r"of is 'pug'.* take one of dark, light"):
        run.generate(1, of="pug")
    with pytest.raises(ParameterError, match="knows no classes: train one with conditional=True"):
        generate_images(Generator(16, 1, nz=4, ngf=4), 1, of="pug")


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"loss": "wgan"}, "loss is 'wgan', expected one of 'bce', 'hinge', 'relativistic'"),
        ({"augment": "translation,colour"}, "augment is 'colour', expected one of 'translation'"),
        ({"r1": 1.0}, "r1 is 1.0, and d_norm is 'batch'.*Use d_norm 'none'"),
        ({"r1": -1.0, "d_norm": "none"}, "r1 is -1.0, expected 0 or more"),
        ({"ema_images": -1}, "ema_images is -1"),
        ({"augment_after": -1}, "augment_after is -1"),
        ({"augment_late": "colour"}, "augment_late is 'colour', expected one of 'translation'"),
        ({"augment_late_after": 9}, "augment_late_after is 9, and augment_late is empty.*Set"),
        ({"augment": "color", "augment_late": "cutout,color"}, "color is in augment and in"),
        ({"blocks": -1}, "blocks is -1"),
        ({"lr_half_life": -1}, "lr_half_life is -1"),
        ({"lr_hold": 9}, "lr_hold is 9, and lr_half_life 0: .* Set lr_half_life"),
    ],
)
def test_impossible_recipes_are_refused(told: dict[str, object], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        TrainingParameters.from_mapping(told)
