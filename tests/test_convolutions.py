"""Convolutions as matrix products compute what torch's own do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from gan_lib.gan import convolutions
from gan_lib.gan.convolutions import Conv2d, ConvTranspose2d

# Ours, torch's, the side of the map that goes in, and stride and padding.
LAYERS = {
    "8 to 4": (Conv2d, nn.Conv2d, 8, 2, 1),
    "4 to 8": (ConvTranspose2d, nn.ConvTranspose2d, 4, 2, 1),
    "4 to 1": (Conv2d, nn.Conv2d, 4, 1, 0),
    "1 to 4": (ConvTranspose2d, nn.ConvTranspose2d, 1, 1, 0),
    "16 to 8": (Conv2d, nn.Conv2d, 16, 2, 1),
}


def derivatives(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out, its gradients, and those of a gradient penalty."""
    y = layer(x)
    told = [x, *layer.parameters()]
    first = torch.autograd.grad(y.tanh().sum(), told, create_graph=True)
    return [y, *first, *torch.autograd.grad(first[0].square().sum(), told, allow_unused=True)]


@pytest.mark.parametrize("wide", [1, convolutions.WIDE])
@pytest.mark.parametrize("name", LAYERS)
def test_all_derivatives_are_those_of_torch(
    name: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "WIDE", wide)
    ours, theirs, side, stride, padding = LAYERS[name]
    torch.manual_seed(0)
    layer, other = (c(5, 3, 4, stride, padding).double() for c in (ours, theirs))
    other.load_state_dict(layer.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(6, 5, side, side, dtype=torch.float64)
        x = x.contiguous(memory_format=layout).requires_grad_()
        pairs = zip(derivatives(layer, x), derivatives(other, x), strict=True)
        for mine, its in pairs:
            assert (mine is None) == (its is None)
            if mine is not None:
                torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", LAYERS)
def test_in_bfloat16_they_round_as_torch_does(name: str) -> None:
    ours, theirs, side, stride, padding = LAYERS[name]
    torch.manual_seed(0)
    layer, other = (c(32, 64, 4, stride, padding, bias=False) for c in (ours, theirs))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(8, 32, side, side, requires_grad=True)
    found = []
    for each in (layer, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, each.weight])))
    for mine, its in zip(*found, strict=True):
        assert mine.dtype == its.dtype
        assert (mine - its).abs().max() <= 0.02 * its.abs().max()


def test_freed_memory_is_kept() -> None:
    code = """
import resource
from gan_lib.base.memory import keep_freed_memory

many = 10**8

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * many
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    if sys.platform == "linux":
        assert kept < given_back / 10
