"""New, or remembered: copies are found out, and what was drawn independently is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gan_lib.base.errors import ParameterError
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.gan.drawing import generate_images
from gan_lib.parameters import TrainingParameters
from gan_lib.quality.features import EfficientNetLite0
from gan_lib.quality.novelty import nearest_training_images
from gan_lib.results.quality_plots import plot_nearest, plot_ratios
from gan_lib.training.rank import train_gan


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def dogs() -> ImageSet:
    """Different ones: some silhouettes are in the package twice."""
    images = prepare_images("dog-silhouettes", 16, channels=1)
    _, first = np.unique(images.pixels[:], axis=0, return_index=True)
    chosen = np.random.default_rng(0).permutation(first)[:160]
    return of_pixels(images, images.pixels[chosen])


def of_pixels(images: ImageSet, pixels: np.ndarray) -> ImageSet:
    return replace(images, pixels=pixels, labels=np.zeros(len(pixels), np.int64), digest="")


def copies(pixels: np.ndarray) -> np.ndarray:
    """The same, a little noisy, as a generator draws them; some mirrored."""
    noise = np.random.default_rng(1).normal(0, 6, pixels.shape)
    drawn = (pixels + noise).round().clip(0, 255).astype(np.uint8)
    drawn[::2] = drawn[::2, :, ::-1]
    return drawn


def test_copies_are_remembered(dogs: ImageSet, network: EfficientNetLite0) -> None:
    train = of_pixels(dogs, dogs.pixels[:120])
    found = nearest_training_images(copies(train.pixels[:40]), train, network, progress=False)
    assert found.remembered
    assert "remembered: " in str(found)
    assert "120 training images" in str(found)
    # The most suspicious first, each with that of which it is a copy.
    assert (np.diff(found.ratios) >= 0).all()
    surest = found.ratios < found.threshold
    np.testing.assert_array_equal(found.generated[surest], found.real[surest])
    title = plot_nearest(found, train.pixels[:40], train).get_suptitle()
    assert "remembered" in title
    # Both kinds in one picture, of which one in twenty of the real ones is below the threshold.
    (axes,) = plot_ratios(found).axes
    assert len(axes.get_legend().get_texts()) == 3
    assert (found.by_chance < found.threshold).mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.long
def test_a_generator_that_has_seen_fifty_images_is_found_out(
    network: EfficientNetLite0,
) -> None:
    p = TrainingParameters(
        image_size=32, channels=1, max_images=50, batch_size=25, epochs=3000, seed=0,
        nz=100, ngf=32, ndf=32, lr_g=4e-4, lr_d=4e-4, d_bias=True, flip=False, ema_images=2000,
    )  # fmt: skip
    images = prepare_images("dog-silhouettes", 32, channels=1, max_images=50)
    generator = train_gan(p, images=images, progress=False).generator
    drawn = generate_images(generator, 200, seed=3)
    found = nearest_training_images(drawn, images, network, flip=False, progress=False)
    assert found.remembered, str(found)


def test_other_images_are_new(dogs: ImageSet, network: EfficientNetLite0) -> None:
    train = of_pixels(dogs, dogs.pixels[:120])
    found = nearest_training_images(dogs.pixels[120:], train, network, progress=False)
    assert not found.remembered
    assert str(found).startswith("new: ")


def test_images_that_are_there_twice_confuse_nobody(
    dogs: ImageSet, network: EfficientNetLite0
) -> None:
    once = dogs.pixels[:60]
    brighter = np.clip(once.astype(int) + 2, 0, 255).astype(np.uint8)
    twice = of_pixels(dogs, np.concatenate([once, brighter, once[:, :, ::-1]]))
    found = nearest_training_images(copies(once[:30]), twice, network, progress=False)
    assert found.remembered
    found = nearest_training_images(dogs.pixels[120:150], twice, network, progress=False)
    assert not found.remembered


def test_too_few_images_to_tell(dogs: ImageSet) -> None:
    with pytest.raises(ParameterError, match="there are 9 images"):
        nearest_training_images(dogs.pixels[:3], of_pixels(dogs, dogs.pixels[:9]))
