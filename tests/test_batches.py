from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from gan_lib.base.errors import ParameterError
from gan_lib.data import batches
from gan_lib.data.batches import Batches, epoch_shares
from gan_lib.data.image_set import ImageSet
from gan_lib.data.pixels import denormalise, jitter_colours, normalise
from gan_lib.gan.augmentation import Look
from gan_lib.gan.drawing import render
from gan_lib.gan.models import Generator
from gan_lib.gan.steps import REAL
from gan_lib.parameters import TrainingParameters


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("n_images", [21, 96, 1000])
def test_shares_are_disjoint_and_complete(n_images: int, world_size: int) -> None:
    shares = epoch_shares(n_images, 16, world_size, seed=0, epoch=1)
    seen = np.concatenate([share for step in shares for share in step])
    assert len(seen) == n_images
    assert set(seen) == set(range(n_images))
    sizes = [sum(map(len, step)) for step in shares]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    assert min(len(share) for step in shares for share in step) >= 1


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def flat(seed: int, epoch: int, world_size: int) -> list[int]:
        shares = epoch_shares(100, 16, world_size, seed, epoch)
        return [i for step in shares for share in step for i in share]

    assert flat(0, 1, 2) == flat(0, 1, 2)
    assert flat(0, 1, 2) != flat(0, 2, 2)
    assert flat(0, 1, 2) != flat(1, 1, 2)
    # The same images meet in the same step, however many ranks share it.
    assert flat(0, 1, 2) == flat(0, 1, 3) == flat(0, 1, 1)


def test_too_few_images_for_the_ranks() -> None:
    with pytest.raises(ParameterError, match=r"batch_size 2 .* 4 ranks"):
        epoch_shares(100, 2, 4, seed=0, epoch=1)


def test_normalising_is_undone_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(denormalise(normalise(values)), values)
    assert normalise(values).min() == -1
    assert normalise(values).max() == 1
    for mean, std in ((0.45, 0.6), (0.0, 1.0)):
        normal = normalise(values, mean, std)
        assert torch.equal(denormalise(normal, mean, std), values)
        assert normal[0] == pytest.approx(-mean / std)
        assert normal[-1] == pytest.approx((1 - mean) / std)


def test_other_normalisation_is_the_same_picture_to_training_and_to_whoever_looks(
    silhouettes: ImageSet,
) -> None:
    def pictures(**changes: float) -> torch.Tensor:
        p = TrainingParameters(batch_size=64, image_size=16, channels=1, **changes)
        batch = next(Batches(silhouettes, p).epoch(1)).images
        seen = Look(p, 0, slice(0, len(batch)), len(batch))(batch, REAL)
        assert seen.abs().max() <= 1
        return denormalise(seen, *p.normalisation).float()

    for changed in ({}, {"noise": 0.3}, {"color_jitter": 0.4}):
        usual, other = pictures(**changed), pictures(pixel_mean=0.3, pixel_std=0.8, **changed)
        assert (usual - other).abs().max() <= 1, changed
    g = Generator(16, 1, nz=8, ngf=4, normalisation=(0.3, 0.8))
    with torch.no_grad():
        g.layers[-2].weight.zero_()  # tanh(0) = 0 is then every pixel
    assert (render(g, torch.zeros(1, 8)) == round(0.3 * 255)).all()


@pytest.mark.parametrize(
    ("mean", "std", "least"), [(0.5, 0.25, "0.5"), (0.2, 0.5, "0.8"), (0.5, 0.0, "0.5")]
)
def test_pixels_beyond_tanh_are_refused(mean: float, std: float, least: str) -> None:
    with pytest.raises(ParameterError, match=f"pixel_std is .* at least {least}"):
        TrainingParameters(pixel_mean=mean, pixel_std=std)


def test_ranks_see_what_one_rank_sees(silhouettes: ImageSet, tiny: TrainingParameters) -> None:
    p = tiny.replace(flip=True, batch_size=31)
    alone = list(Batches(silhouettes, p).epoch(1))
    first = list(Batches(silhouettes, p, rank=0, world_size=2).epoch(1))
    second = list(Batches(silhouettes, p, rank=1, world_size=2).epoch(1))
    assert len(alone) == len(first) == len(second) == 4
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(one.images, torch.cat([a.images, b.images]))
        assert (a.share.stop, b.share.stop) == (b.share.start, one.n_total)
        assert a.weight + b.weight == pytest.approx(2.0)
        assert one.weight == 1.0


def test_images_that_stay_on_the_device_make_the_same_batches(
    silhouettes: ImageSet, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "AT_ONCE", 40)  # more than one part
    for rank in range(2):
        one, other = (
            list(Batches(silhouettes, tiny, rank, 2, "cpu", resident).epoch(2, first_step=1))
            for resident in (False, True)
        )
        assert len(one) == len(other) == 2
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert a.images.stride() == b.images.stride()
            assert (a.share, a.n_total, a.weight) == (b.share, b.n_total, b.weight)


def test_the_next_images_are_read_while_a_step_goes_on(
    silhouettes: ImageSet, tiny: TrainingParameters
) -> None:
    asked, second = [], threading.Event()

    class Read:  # and not lying in memory
        shape = silhouettes.pixels.shape

        def __len__(self) -> int:
            return len(silhouettes)

        def __getitem__(self, key: np.ndarray) -> np.ndarray:
            asked.append(key)
            if len(asked) == 2:
                second.set()
            return silhouettes.pixels[key]

    read = Batches(replace(silhouettes, pixels=Read()), tiny).epoch(1)
    first = next(read)
    assert second.wait(60)  # nobody has asked for the second batch yet
    assert len(asked) == 2  # and the third one waits until somebody does
    for one, other in zip([first, *read], Batches(silhouettes, tiny).epoch(1), strict=True):
        assert torch.equal(one.images, other.images)


def test_flips_mirror_about_half_of_the_images() -> None:
    pixels = np.zeros((400, 16, 16, 1), np.uint8)
    pixels[:, :, :8] = 255
    halves = ImageSet(pixels, np.zeros(400, np.int64), ("half",))
    p = TrainingParameters(image_size=16, channels=1, batch_size=400)
    batch = next(iter(Batches(halves, p).epoch(1)))
    light_left = (batch.images[:, 0, 0, 0] > 0).float().mean().item()
    assert 0.4 < light_left < 0.6
    plain = next(iter(Batches(halves, p.replace(flip=False)).epoch(1)))
    assert (plain.images[:, 0, 0, 0] == 1).all()


def test_colour_factors_mean_what_they_say() -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    assert torch.allclose(jitter_colours(images, torch.ones(4, 3)), images, atol=1e-6)
    grey = jitter_colours(images, torch.tensor([[1.0, 1.0, 0.0]]).expand(4, 3))
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)
    assert jitter_colours(images, torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3)).max() == -1
    flat = jitter_colours(images, torch.tensor([[1.0, 0.0, 1.0]]).expand(4, 3))
    assert flat.flatten(1).std(dim=1).max() < 1e-6
