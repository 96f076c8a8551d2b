from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gan_lib.gan.convolutions import Conv2d, ConvTranspose2d
from gan_lib.gan.drawing import generate_images
from gan_lib.gan.models import Discriminator, Generator, count_parameters, layer_shapes


def test_published_dcgan_at_64_pixels() -> None:
    g, d = Generator(64, 3, nz=100, ngf=64), Discriminator(64, 3, ndf=64)
    assert count_parameters(g) == 3_576_704
    assert count_parameters(d) == 2_765_568
    # Figure 1 of the paper, and its mirror image.
    assert [shape for _, shape in layer_shapes(g, torch.randn(1, 100))] == [
        (1, 512, 4, 4),
        (1, 256, 8, 8),
        (1, 128, 16, 16),
        (1, 64, 32, 32),
        (1, 3, 64, 64),
    ]
    assert [shape for _, shape in layer_shapes(d, torch.randn(1, 3, 64, 64))] == [
        (1, 64, 32, 32),
        (1, 128, 16, 16),
        (1, 256, 8, 8),
        (1, 512, 4, 4),
        (1, 1, 1, 1),
    ]


def test_dcgan_layers_between_the_convolutions() -> None:
    g = [type(layer) for layer in Generator().layers]
    assert g[:3] == [ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert g[-2:] == [ConvTranspose2d, nn.Tanh]
    d = [type(layer) for layer in Discriminator().layers]
    assert d[:5] == [Conv2d, nn.LeakyReLU, Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert d[-1] is Conv2d


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size(image_size: int, channels: int) -> None:
    g, d = Generator(image_size, channels, nz=8, ngf=4), Discriminator(image_size, channels, ndf=4)
    images = g(torch.randn(2, 8))
    assert images.shape == (2, channels, image_size, image_size)
    assert images.abs().max() <= 1
    assert d(images).shape == (2,)


def test_a_size_between_is_refused() -> None:
    with pytest.raises(ValueError, match="60"):
        Generator(60)


def test_weights_start_as_published() -> None:
    torch.manual_seed(0)
    for module in [*Generator().modules(), *Discriminator().modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert module.bias.abs().max() == 0


def test_an_image_depends_on_its_own_latent_vector_alone() -> None:
    g = Generator(16, 1, nz=8, ngf=4)
    g(torch.randn(32, 8))  # gives BatchNorm something to remember
    many, few = generate_images(g, 8, seed=3), generate_images(g, 2, seed=3)
    assert many.shape == (8, 16, 16, 1)
    assert many.dtype == np.uint8
    np.testing.assert_array_equal(many[:1], generate_images(g, 8, seed=3)[:1])
    assert few.shape == (2, 16, 16, 1)
    assert g.training
