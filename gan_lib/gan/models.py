"""Noise -> image -> score: the two networks of DCGAN.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016, arXiv:1511.06434,
figure 1 and section 3. At 64 pixels these are the published layers; each other
size adds or removes one doubling of the resolution. With `blocks`, each layer but the
last is followed by residual blocks, which DCGAN does not have.

Both classes are ordinary modules that know nothing of ranks or clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from gan_lib.gan.convolutions import Conv2d, ConvTranspose2d
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
    deviation; `render` undoes it. With `classes`, name -> number of real images, it makes images
    of a class that it is told. `blocks` are the residual blocks after each layer but the last.

    Shapes:
        (N, nz) or (N, nz, 1, 1) -> (N, channels, image_size, image_size), values in [-1, 1];
        with `classes` also labels, (N,), an index into them.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        nz: int = 100,
        ngf: int = 64,
        normalisation: tuple[float, float] = (0.5, 0.5),
        classes: Mapping[str, int] | None = None,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.nz = nz
        self.normalisation = normalisation
        self.classes = dict(classes or {})

        def norm(width: int) -> nn.Module:
            n_classes = len(self.classes)
            return ClassBatchNorm(width, n_classes) if n_classes else nn.BatchNorm2d(width)

        def after(width: int) -> list[nn.Module]:
            again = [ConvTranspose2d(width, width, 3, padding=1, bias=False) for _ in range(blocks)]
            return [norm(width), nn.ReLU(inplace=True), *(Block(c, norm(width), 0) for c in again)]

        widths = [ngf * factor for factor in reversed(_width_factors(image_size))]
        layers: list[nn.Module] = [
            ConvTranspose2d(nz, widths[0], kernel_size=4, stride=1, padding=0, bias=False),
            *after(widths[0]),
        ]
        for c_in, c_out in pairwise(widths):
            layers += [
                ConvTranspose2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False),
                *after(c_out),
            ]
        layers += [
            ConvTranspose2d(widths[-1], channels, kernel_size=4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        ]
        self.layers = nn.Sequential(*layers)
        self.apply(initialise_weights)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = z.reshape(len(z), self.nz, 1, 1)
        for layer in self.layers:
            x = layer(x, labels) if isinstance(layer, ClassBatchNorm | Block) else layer(x)
        return x


class Block(nn.Module):
    """Looks at feature maps once more, and adds what it finds there to them.

    He et al. 2016, arXiv:1512.03385, equation 1, with one convolution. What is added begins at
    nothing (Goyal et al. 2017, arXiv:1706.02677, section 5.1), so a generator with blocks begins as
    the same generator without. (But with spectral norm: nothing cannot have a slope of 1.)
    `slope` is that of the ReLU behind it for values below 0.

    Shapes:
        (N, width, H, W) -> the same; labels, (N,), go to a `ClassBatchNorm`.
    """

    def __init__(
        self, convolution: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module, slope: float
    ) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm
        self.slope = slope

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        found = self.convolution(x)
        wants = isinstance(self.norm, ClassBatchNorm)
        found = self.norm(found, labels) if wants else self.norm(found)
        return leaky_relu(x + found, self.slope, inplace=True)


class ClassBatchNorm(nn.Module):
    """BatchNorm whose factor and offset are those of each image's class.

    Dumoulin et al. 2017, arXiv:1610.07629, section 2.2. The classes share one factor and one
    offset, and have differences of their own, which begin small: where a class has few images,
    it is drawn like the others.

    Shapes:
        (N, width, H, W) and labels (N,) -> (N, width, H, W).
    """

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.own = nn.Embedding(n_classes, 2 * width)
        nn.init.normal_(self.own.weight, 0.0, 0.02)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        factor, offset = self.own(labels)[:, :, None, None].chunk(2, dim=1)
        normed: Tensor = self.norm(x) * (1 + factor) + offset
        return normed


class Discriminator(nn.Module):
    """Scores images: the higher, the more it takes them for real.

    The score is a logit. DCGAN's last layer is a sigmoid; here the loss applies
    it (`binary_cross_entropy_with_logits`), which is the same function and does
    not overflow in bfloat16.

    `norm` is what keeps its layers in measure: "batch", as published; "spectral", which keeps
    each layer's slope at 1 (Miyato et al. 2018, arXiv:1802.05957); or "none", as gradient
    penalties need it. With `n_classes` it judges an image together with its class, by a
    projection (Miyato and Koyama 2018, arXiv:1802.05637, equation 3).

    `bias` gives the first layer an offset. As published there is none, and then BatchNorm takes
    out what the layers before it left in: a batch of images with half the contrast has the same
    scores, and nothing holds the generator to the contrast of the real ones. The other norms have
    offsets in any case. `blocks` are the residual blocks after each layer but the last.

    Shapes:
        (N, channels, image_size, image_size) -> (N,); with `n_classes` also labels, (N,).
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        ndf: int = 64,
        norm: str = "batch",
        n_classes: int = 0,
        bias: bool = False,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        widths = [ndf * factor for factor in _width_factors(image_size)]
        own_offset = norm != "batch"  # BatchNorm brings one

        def more(width: int) -> list[nn.Module]:
            normed = nn.BatchNorm2d if norm == "batch" else nn.Identity
            again = [Conv2d(width, width, 3, padding=1, bias=own_offset) for _ in range(blocks)]
            return [Block(convolution, normed(width), slope=0.2) for convolution in again]

        # No BatchNorm on the first layer (section 3): it would hide the images' own statistics.
        layers: list[nn.Module] = [
            Conv2d(channels, widths[0], 4, stride=2, padding=1, bias=own_offset or bias),
            nn.LeakyReLU(0.2, inplace=True),
            *more(widths[0]),
        ]
        for c_in, c_out in pairwise(widths):
            layers += [Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=own_offset)]
            layers += [nn.BatchNorm2d(c_out)] if norm == "batch" else []
            layers += [nn.LeakyReLU(0.2, inplace=True), *more(c_out)]
        layers += [Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=0, bias=False)]
        self.layers = nn.Sequential(*layers)
        self.of_class = nn.Embedding(n_classes, widths[-1]) if n_classes else None
        self.apply(initialise_weights if norm == "batch" else initialise_without_norm)
        if norm == "none":
            for layer in self.layers:
                if isinstance(layer, Block):
                    nn.init.zeros_(layer.convolution.weight)
        if norm == "spectral":
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Embedding):
                    spectral_norm(module)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        features: Tensor = self.layers[:-1](images)
        scores: Tensor = self.layers[-1](features).reshape(-1)
        if self.of_class is not None:
            scores = scores + (self.of_class(labels) * features.sum((2, 3))).sum(1)
        return scores


def generator_of(p: TrainingParameters, classes: Mapping[str, int] | None = None) -> Generator:
    """A new generator as the parameters describe it; `classes` are used if it is conditional."""
    told = classes if p.conditional else None
    return Generator(p.image_size, p.channels, p.nz, p.ngf, p.normalisation, told, p.blocks)


def discriminator_of(p: TrainingParameters, n_classes: int = 0) -> Discriminator:
    """A new discriminator as the parameters describe it, see `generator_of`."""
    told = n_classes if p.conditional else 0
    return Discriminator(p.image_size, p.channels, p.ndf, p.d_norm, told, p.d_bias, p.blocks)


def initialise_weights(module: nn.Module) -> None:
    """Normal weights with standard deviation 0.02 (section 4); for `module.apply`."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, Block):  # after its parts
        norm = module.norm.norm if isinstance(module.norm, ClassBatchNorm) else module.norm
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.zeros_(norm.weight)


def initialise_without_norm(module: nn.Module) -> None:
    """Weights that neither weaken nor strengthen what goes through them, for `module.apply`.

    He et al. 2015, arXiv:1502.01852, equation 15: without BatchNorm, DCGAN's small weights would
    leave next to nothing of an image at the other end.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)


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
