"""Depthwise convolutions of tokens: of the visible ones alone, of all of a picture or a clip."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _VisibleDepthwiseConv(torch.autograd.Function):
    """Depthwise convolution of tokens that lie on an otherwise zero canvas.

    Scatter, convolve, gather; backward is the same with the gradient. Only the tokens are kept
    for it, not the canvas, which would be `1 / (1 - mask_ratio)` times as large.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, index, canvas):
        ctx.save_for_backward(x, weight, index)
        ctx.canvas = canvas
        padding = [k // 2 for k in weight.shape[2:]]
        conv = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        out = conv(_scatter(x, index, canvas), weight, bias, padding=padding, groups=len(weight))
        return _gather(out, index)

    @staticmethod
    def backward(ctx, grad):
        x, weight, index = ctx.saved_tensors
        ones, channels = [1] * (weight.ndim - 2), len(weight)
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            _scatter(grad, index, ctx.canvas),
            _scatter(x, index, ctx.canvas),
            weight,
            [channels],
            ones,
            [k // 2 for k in weight.shape[2:]],
            ones,
            False,
            [0] * len(ones),
            channels,
            [True, True, False],
        )
        # Only visible tokens have a gradient, so the bias needs no sum over the canvas.
        # Flat and back, for the strides of the weight itself, which DDP prefers.
        grad_weight = grad_weight.flatten().view(weight.shape)
        return _gather(grad_input, index), grad_weight, grad.sum(0), None, None


def _scatter(x: Tensor, index: Tensor, canvas: tuple[int, ...]) -> Tensor:
    """Tokens `[T, C]` onto a zero canvas `[N, C, *grid]` (channels last in memory)."""
    rows = x.new_zeros(math.prod(canvas), x.shape[1]).index_copy(0, index, x)
    return rows.view(*canvas, -1).movedim(-1, 1)


def _gather(grid: Tensor, index: Tensor) -> Tensor:
    """The tokens `[T, C]` of a grid `[N, C, *grid]` that lie at `index`."""
    return grid.movedim(1, -1).reshape(-1, grid.shape[1]).index_select(0, index)


# Depthwise convolutions in space and time are sums of 2-d ones over shifted frames: libraries
# have fast kernels for those alone.


def _conv_frames(x: Tensor, weight: Tensor, padding: Sequence[int], halo: int = 0) -> Tensor:
    """Depthwise convolution of frames with channels last; beyond the first and last are zeros.

    Args:
        x: `[M, halo + T + halo, H, W, C]`.
        weight: `[C, 1, *kernel]`.
        padding: of height and width.
        halo: frames on either side that are only looked at.

    Returns:
        `[M, T, H', W', C]`.
    """
    frames = x.flatten(0, 1).movedim(-1, 1)  # [M * frames, C, H, W]
    out = None
    for tap, start in _taps(weight.shape[2], halo):
        y = F.conv2d(frames, weight[:, :, tap], padding=tuple(padding), groups=len(weight))
        y = y.movedim(1, -1).unflatten(0, x.shape[:2])
        to, there = _overlap(start, x.shape[1], halo)
        if out is None:  # the middle tap, which has all frames
            out = y[:, there].contiguous()
        else:
            out[:, to] += y[:, there]
    return out


def _conv_frames_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], halo: int = 0
) -> Tensor:
    """The gradient of `_conv_frames` by its weight, `grad` being that by its output."""
    taps = [None] * weight.shape[2]
    for tap, start in _taps(len(taps), halo):
        to, there = _overlap(start, x.shape[1], halo)
        _, taps[tap], _ = torch.ops.aten.convolution_backward(
            grad[:, to].flatten(0, 1).movedim(-1, 1),
            x[:, there].flatten(0, 1).movedim(-1, 1),
            weight[:, :, tap],
            [len(weight)],
            [1, 1],
            list(padding),
            [1, 1],
            False,
            [0, 0],
            len(weight),
            [False, True, False],
        )
    return torch.stack(taps, dim=2)


def _taps(length: int, halo: int) -> list[tuple[int, int]]:
    """The taps of a kernel in time, the middle one first, with the frame that the first sees."""
    order = sorted(range(length), key=lambda tap: abs(tap - length // 2))
    return [(tap, halo + tap - length // 2) for tap in order]


def _overlap(start: int, frames: int, halo: int) -> tuple[slice, slice]:
    """Frames of the output, and those of the input that a tap adds to them."""
    first, last = max(0, -start), min(frames - 2 * halo, frames - start)
    return slice(first, last), slice(first + start, last + start)


class _FramesDepthwise(torch.autograd.Function):
    """Depthwise convolution of whole clips `[N, T, H, W, C]`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _conv_frames(x, weight, _same(weight)) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            _conv_frames(grad, weight.flip(2, 3, 4), _same(weight)),
            _conv_frames_weight_grad(grad, x, weight, _same(weight)),
            grad.sum((0, 1, 2, 3)),
        )


def _same(weight: Tensor) -> list[int]:
    """The padding in space that keeps the size."""
    return [k // 2 for k in weight.shape[3:]]


class Windows(NamedTuple):
    """Boxes of a stage's grid, one around each visible mask unit of a clip.

    Attributes:
        rows: `[M, T', H', W']`, the token at each place of a box; the number of tokens for none.
        halo: how far a box reaches beyond its unit along each dimension.
        order: `[N * B * U]`, the place of each token among the units' own, `[M * T * H * W]`.
    """

    rows: Tensor
    halo: tuple[int, ...]
    order: Tensor

    @classmethod
    def around(
        cls, index: Tensor, canvas: Sequence[int], unit: Sequence[int], kernel: Sequence[int]
    ) -> "Windows":
        """The boxes that a convolution of the units' tokens looks at.

        Args:
            index: see `VisibleGrid`; the tokens of a unit lie together.
            canvas: `(N, *grid)`.
            unit: size of a mask unit on the grid.
            kernel: of the convolution.
        """
        # A unit as long as the grid has nothing on either side.
        reach = zip(kernel, unit, canvas[1:], strict=True)
        halo = tuple([0 if u == size else k // 2 for k, u, size in reach])
        clip, *corner = torch.unravel_index(index.view(-1, math.prod(unit)).amin(1), canvas)
        place, inside = clip.view(-1, 1, 1, 1), True
        for d, (first, u, h, size) in enumerate(zip(corner, unit, halo, canvas[1:], strict=True)):
            shape = [-1 if axis == d else 1 for axis in range(3)]
            along = torch.arange(-h, u + h, device=index.device).view(1, *shape)
            along = first.view(-1, 1, 1, 1) + along
            place, inside = place * size + along, inside & (along >= 0) & (along < size)
        nothing = math.prod(canvas)
        place = torch.where(inside, place, nothing)
        token = torch.full((nothing + 1,), len(index), device=index.device)
        token[index] = torch.arange(len(index), device=index.device)
        rows = token[place]
        own = rows[cls._inner(halo)].flatten()
        order = torch.empty_like(own)
        order[own] = torch.arange(len(own), device=index.device)
        return cls(rows, halo, order)

    @staticmethod
    def _inner(halo: Sequence[int]) -> tuple[slice, ...]:
        return (slice(None), *(slice(h, -h or None) for h in halo))

    def gather(self, x: Tensor) -> Tensor:
        """Tokens `[V, C]` to boxes `[M, T', H', W', C]`, zeros where none is visible."""
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, -1)

    def own(self, boxes: Tensor) -> Tensor:
        """The units' own part of boxes."""
        return boxes[self._inner(self.halo)].contiguous()

    def padding(self, weight: Tensor) -> list[int]:
        """Of height and width: where a unit is as long as the grid, what is beyond are zeros."""
        return [0 if h else p for h, p in zip(self.halo[1:], _same(weight), strict=True)]

    def convolve(self, boxes: Tensor, weight: Tensor) -> Tensor:
        """Boxes to the tokens `[V, C]` of their units, convolved."""
        out = _conv_frames(boxes, weight, self.padding(weight), self.halo[0])
        return out.view(-1, out.shape[-1]).index_select(0, self.order)


class _WindowsDepthwise(torch.autograd.Function):
    """Depthwise convolution of a clip's visible tokens; only around them anything is computed.

    Only the tokens are kept for the backward pass, which is the same with the gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, rows, halo, order):
        windows = Windows(rows, halo, order)
        ctx.save_for_backward(x, weight, rows, order)
        ctx.halo = halo
        return windows.convolve(windows.gather(x), weight) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, rows, order = ctx.saved_tensors
        windows = Windows(rows, ctx.halo, order)
        boxes = windows.gather(grad)
        grad_weight = _conv_frames_weight_grad(
            windows.own(boxes), windows.gather(x), weight, windows.padding(weight), windows.halo[0]
        )
        grad_x = windows.convolve(boxes, weight.flip(2, 3, 4))
        return grad_x, grad_weight, grad.sum(0), None, None, None


class VisibleGrid(NamedTuple):
    """Where the visible tokens of one stage lie on that stage's grid.

    Attributes:
        index: `[N * B * U]`, rows of the flattened canvas, in the order of the tokens.
        canvas: `(N, *grid)`.
        windows: of a clip, what lies around its mask units.
    """

    index: Tensor
    canvas: tuple[int, ...]
    windows: Windows | None = None

    def depthwise(self, x: Tensor, conv: nn.Module) -> Tensor:
        """Apply a depthwise convolution to tokens `[N, B, U, C]`; what is not visible is zero.

        It is computed in the tokens' type, under autocast too.
        """
        weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
        tokens = x.flatten(0, 2)
        if self.windows is None:
            out = _VisibleDepthwiseConv.apply(tokens, weight, bias, self.index, self.canvas)
        else:
            out = _WindowsDepthwise.apply(tokens, weight, bias, *self.windows)
        return out.view_as(x)


class DenseGrid:
    """All tokens of a stage on their grid, `[N, *grid, C]`: nothing is masked."""

    def depthwise(self, x: Tensor, conv: nn.Module) -> Tensor:
        """Apply a depthwise convolution to tokens `[N, *grid, C]`."""
        if x.ndim == 5:
            return _FramesDepthwise.apply(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype))
        return conv(x.movedim(-1, 1)).movedim(1, -1)
