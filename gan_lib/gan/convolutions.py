"""torch's convolutions, with the smallest maps computed as matrix products.

oneDNN goes through a map row by row, and a row of 4 pixels is too short for the processor's
vectors, and more so for the tiles of AMX. In one product, the pixels of all images together are
a side of a matrix. DCGAN has most of its weights there: at 64 pixels, the layer between 8 x 8 and
4 x 4 takes 0.7 of the time in float32 and 0.3 in bfloat16 (an Intel Xeon with AMX).

The two classes have the names, arguments and weights of torch's, and compute the same, but for
rounding. On a GPU, what is not a plain product is left to cuDNN.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

SMALL = 4  # pixels: the side of the smaller maps
# Feature maps on the wider side of a layer, from which on all of its products are faster so; with
# fewer only the gradient of the weights, and only in bfloat16.
WIDE = 512


class Conv2d(nn.Conv2d):
    """As `torch.nn.Conv2d`, faster where maps of 4 x 4 pixels come out, or one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_whole(self) and x.shape[2:] == (SMALL, SMALL):
            y = (_rows(x) @ _rows(self.weight).t())[:, :, None, None]
        elif _is_halving(self) and _gains(x, self.weight, 2 * SMALL):
            y = _Halve.apply(*_cast(x, self.weight))
        else:
            return super().forward(x)
        return y if self.bias is None else y + self.bias[:, None, None]


class ConvTranspose2d(nn.ConvTranspose2d):
    """As `torch.nn.ConvTranspose2d`, faster where one pixel goes in, or maps of 4 x 4."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _is_whole(self) and x.shape[2:] == (1, 1):
            y = _maps(x.flatten(1) @ _rows(self.weight), self.out_channels)
        elif _is_halving(self) and _gains(x, self.weight, SMALL):
            y = _Double.apply(*_cast(x, self.weight))
        else:
            return super().forward(x, output_size)
        return y if self.bias is None else y + self.bias[:, None, None]


# The three products of a convolution with x: n x C x 8 x 8, y: n x D x 4 x 4 and weights
# w: D x C x 4 x 4. Each is linear in both of its arguments, so the gradients of each are the
# other two, however often one differentiates.


class _Halve(torch.autograd.Function):
    """y of x and w: a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        if max(w.shape[:2]) < WIDE:
            return torch.conv2d(x, w, stride=2, padding=1)
        return _maps(_windows(_framed(x), 4, 2) @ _rows(w).t(), len(w))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        of_x, of_w = ctx.needs_input_grad
        return _Double.apply(dy, w) if of_x else None, _Weigh.apply(x, dy) if of_w else None


class _Double(torch.autograd.Function):
    """x of y and w: a transposed convolution."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        if max(w.shape[:2]) < WIDE:
            return torch.conv_transpose2d(y, w, stride=2, padding=1)
        # Even rows of x come from two rows of y by the weights' rows 3 and 1, odd ones by 2 and 0;
        # and so do columns: four products, with a quarter of the weights each.
        d, c = w.shape[:2]
        rows_and_columns = w.permute(0, 2, 3, 1).flip(1, 2).view(d, 2, 2, 2, 2, c)
        quarters = rows_and_columns.permute(2, 4, 1, 3, 0, 5).reshape(2, 2, 4 * d, c)
        framed, x = _framed(y), y.new_empty(len(y), SMALL, 2, SMALL, 2, c)
        for i, j in product(range(2), range(2)):
            pixels = _windows(framed, 2, 1, i, j) @ quarters[i, j]
            x[:, :, i, :, j] = pixels.view(len(y), SMALL, SMALL, c)
        return x.view(len(y), 2 * SMALL, 2 * SMALL, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, w = ctx.saved_tensors
        of_y, of_w = ctx.needs_input_grad
        return _Halve.apply(dx, w) if of_y else None, _Weigh.apply(dx, y) if of_w else None


class _Weigh(torch.autograd.Function):
    """The gradient of w, of x and dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        dy = y.permute(0, 2, 3, 1).flatten(0, 2)
        return _maps(dy.t() @ _windows(_framed(x), 4, 2), x.shape[1])

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        of_x, of_y = ctx.needs_input_grad
        return _Double.apply(y, dw) if of_x else None, _Halve.apply(x, dw) if of_y else None


def _is_halving(module: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    shape = module.kernel_size, module.stride, module.padding
    return shape == ((4, 4), (2, 2), (1, 1))


def _is_whole(module: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    shape = module.kernel_size, module.stride, module.padding
    return shape == ((SMALL, SMALL), (1, 1), (0, 0))


def _gains(x: Tensor, w: Tensor, side: int) -> bool:
    here = x.device.type == "cpu" and x.shape[2:] == (side, side)
    return here and (max(w.shape[:2]) >= WIDE or _dtype(x) is torch.bfloat16)


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """As autocast does it before torch's own convolutions."""
    return x.to(_dtype(x)), w.to(_dtype(x))


def _rows(w: Tensor) -> Tensor:
    """n x C x H x W -> n x (H * W * C): as they lie in memory, if that is channels_last."""
    return w.permute(0, 2, 3, 1).flatten(1)


def _maps(rows: Tensor, channels: int) -> Tensor:
    """Back to n x C x 4 x 4."""
    return rows.view(-1, SMALL, SMALL, channels).permute(0, 3, 1, 2)


def _framed(x: Tensor) -> Tensor:
    """n x C x H x W -> n x (H + 2) x (W + 2) x C, with a frame of zeros."""
    return pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _windows(framed: Tensor, side: int, step: int, top: int = 0, left: int = 0) -> Tensor:
    """The 4 x 4 windows of each image: (n * 16) x (side * side * C)."""
    n, _, _, c = framed.shape
    image, row, column, _ = framed.stride()
    # The pixels of a row, and their channels, lie one after the other.
    shape = n, SMALL, SMALL, side, side * c
    steps = image, step * row, step * column, row, 1
    windows = framed.as_strided(shape, steps, top * row + left * column)
    return windows.reshape(n * SMALL * SMALL, side * side * c)
