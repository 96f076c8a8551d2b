"""Pixels as a file has them, and as the networks see them; colours changed on the device."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Pixels(Protocol):
    """What an array of uint8, N x H x W x C, does; others may read what they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> np.ndarray: ...

    def __array__(self) -> np.ndarray: ...


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The same values there. A GPU fetches them in its own time: nobody waits for it here."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def normalise(pixels: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """uint8 0..255 -> float32: as 0..1, minus `mean`, over `std`.

    By default that is -1..1, the whole range of the generator's tanh.
    """
    return pixels.to(torch.float32).div_(255 * std).sub_(mean / std)


def denormalise(images: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """float -> uint8 0..255: undoes `normalise`."""
    pixels = images.float().add(mean / std).mul(255 * std)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def jitter_colours(images: Tensor, factors: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Change brightness, contrast and saturation, as torchvision's ColorJitter does to one image.

    Args:
        images: as `normalise` makes them with the same mean and std, n x C x H x W.
        factors: n x 3, of brightness, contrast and saturation; 1 changes nothing.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    # As 0..1, because black is what brightness is measured from.
    images = (images * std + mean) * brightness
    images = images.lerp(images.mean(dim=(1, 2, 3), keepdim=True), 1 - contrast)
    images = images.lerp(images.mean(dim=1, keepdim=True), 1 - saturation)
    images = (images.clamp(0, 1) - mean) / std
    return images.contiguous(memory_format=torch.channels_last)
