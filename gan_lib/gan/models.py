"""Noise -> image -> score: the two networks of DCGAN.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016, arXiv:1511.06434,
figure 1 and section 3. At 64 pixels these are the published layers; each other
size adds or removes one doubling of the resolution.

Both classes are ordinary modules that know nothing of ranks or clusters.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from gan_lib.data.pixels import denormalise
from gan_lib.parameters import IMAGE_SIZES, TrainingParameters

# Both networks meet the image at 4 x 4 pixels, where a latent vector becomes
# feature maps and feature maps become a score.
SMALLEST = 4
# DCGAN at 64 pixels is 8 times as wide at 4 x 4 as at its image end. Larger
# images keep that factor: doubling on would give 256 pixels 180 million weights.
WIDEST = 8


class Generator(nn.Module):
    """Makes images from latent vectors.

    `normalisation` is what the images it learns from are normalised by, mean and standard
    deviation; `render` undoes it.

    Shapes:
        (N, nz) or (N, nz, 1, 1) -> (N, channels, image_size, image_size), values in [-1, 1].
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        nz: int = 100,
        ngf: int = 64,
        normalisation: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        super().__init__()
        self.nz = nz
        self.normalisation = normalisation
        widths = [ngf * factor for factor in reversed(_width_factors(image_size))]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(nz, widths[0], kernel_size=4, stride=1, padding=0, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        for c_in, c_out in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
        layers += [
            nn.ConvTranspose2d(
                widths[-1], channels, kernel_size=4, stride=2, padding=1, bias=False
            ),
            nn.Tanh(),
        ]
        self.layers = nn.Sequential(*layers)
        self.apply(initialise_weights)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z.reshape(len(z), self.nz, 1, 1))
        return images


class Discriminator(nn.Module):
    """Scores images: the higher, the more it takes them for real.

    The score is a logit. DCGAN's last layer is a sigmoid; here the loss applies
    it (`binary_cross_entropy_with_logits`), which is the same function and does
    not overflow in bfloat16.

    Shapes:
        (N, channels, image_size, image_size) -> (N,)
    """

    def __init__(self, image_size: int = 64, channels: int = 3, ndf: int = 64) -> None:
        super().__init__()
        widths = [ndf * factor for factor in _width_factors(image_size)]
        # No BatchNorm on the first layer (section 3): it would hide the images' own statistics.
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], kernel_size=4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for c_in, c_out in pairwise(widths):
            layers += [
                nn.Conv2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=0, bias=False)]
        self.layers = nn.Sequential(*layers)
        self.apply(initialise_weights)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores.reshape(-1)


def generator_of(p: TrainingParameters) -> Generator:
    """A new generator as the parameters describe it."""
    return Generator(p.image_size, p.channels, p.nz, p.ngf, p.normalisation)


def initialise_weights(module: nn.Module) -> None:
    """Normal weights with standard deviation 0.02 (section 4); for `module.apply`."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def latent_vectors(n: int, nz: int, seed: int) -> Tensor:
    """Standard normal latent vectors, n x nz, the same for the same seed on every device."""
    return torch.randn(n, nz, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def render(generator: Generator, z: Tensor) -> np.ndarray:
    """The images of latent vectors, in eval mode: uint8, N x H x W x C.

    Eval mode, so that an image depends on its own latent vector alone and not
    on what else is in the batch.
    """
    device = next(generator.parameters()).device
    was_training = generator.training
    generator.eval()
    try:
        images = torch.cat([generator(part.to(device)) for part in z.split(256)])
    finally:
        generator.train(was_training)
    pixels = denormalise(images, *generator.normalisation).cpu()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def generate_images(generator: Generator, n: int, seed: int = 0) -> np.ndarray:
    """Make `n` new images: uint8, n x H x W x C."""
    return render(generator, latent_vectors(n, generator.nz, seed))


def count_parameters(module: nn.Module) -> int:
    """Number of trained values in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def layer_shapes(module: nn.Module, example: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Name and output shape of each convolution of `module`, as `example` flows through it."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    hooks = [
        child.register_forward_hook(
            lambda child, _, output: shapes.append((type(child).__name__, tuple(output.shape)))
        )
        for child in module.modules()
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d)
    ]
    was_training = module.training
    try:
        module.eval()(example)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes


def _width_factors(image_size: int) -> list[int]:
    # 64 pixels: the feature maps have 32, 16, 8 and 4 pixels, so [1, 2, 4, 8].
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size is {image_size}, expected one of {IMAGE_SIZES}")
    doublings = (image_size // SMALLEST).bit_length() - 1
    return [min(2**k, WIDEST) for k in range(doublings)]
