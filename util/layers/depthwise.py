"""Depthwise convolutions of tokens: of the visible ones alone, of all of a picture or a clip."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.layers import depthwise_triton
from util.layers.geometry import channels_first, channels_last, coordinates


def _same(weight: Tensor) -> list[int]:
    """The padding that keeps a grid's size."""
    return [k // 2 for k in weight.shape[2:]]


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias in the type of `x`."""
    return bias if bias is None else bias.to(x.dtype)


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    """`x` `[…, C]` with its bias, if it has one."""
    return x if bias is None else x + bias


def _conv_of_visible(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, canvas: tuple[int, ...]
) -> Tensor:
    """Depthwise convolution of tokens `[T, C]` that lie on an otherwise zero canvas."""
    conv = F.conv2d if weight.ndim == 4 else F.conv3d
    grid = _scatter(x, index, canvas)
    return _gather(conv(grid, weight, bias, padding=_same(weight), groups=len(weight)), index)


class _VisibleDepthwiseConv(torch.autograd.Function):
    """`_conv_of_visible`, which keeps the tokens alone for the backward pass.

    The canvas would be `1 / (1 - mask_ratio)` times as large. Backward is the same with the
    gradient: scatter, convolve, gather.
    """

    forward = staticmethod(_conv_of_visible)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, index, canvas = inputs
        ctx.save_for_backward(x, weight, index)
        ctx.canvas = canvas

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
            _same(weight),
            ones,
            False,
            [0] * len(ones),
            channels,
            [True, True, False],
        )
        # Only visible tokens have a gradient, so the bias needs no sum over the canvas.
        # Flat and back, for the strides of the weight itself, which DDP prefers.
        grad_weight = grad_weight.flatten().view(weight.shape)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return _gather(grad_input, index), grad_weight, grad_bias, None, None


def _scatter(x: Tensor, index: Tensor, canvas: tuple[int, ...]) -> Tensor:
    """Tokens `[T, C]` onto a zero canvas `[N, C, *grid]` (channels last in memory)."""
    rows = x.new_zeros(math.prod(canvas), x.shape[1]).index_copy(0, index, x)
    return channels_first(rows.view(*canvas, -1))


def _gather(grid: Tensor, index: Tensor) -> Tensor:
    """The tokens `[T, C]` of a grid `[N, C, *grid]` that lie at `index`."""
    return channels_last(grid).reshape(-1, grid.shape[1]).index_select(0, index)


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
    frames = channels_first(x.flatten(0, 1))  # [M * frames, C, H, W]
    out = None
    for tap, start in _taps(weight.shape[2], halo):
        y = F.conv2d(frames, weight[:, :, tap], padding=tuple(padding), groups=len(weight))
        y = channels_last(y).unflatten(0, x.shape[:2])
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
            channels_first(grad[:, to].flatten(0, 1)),
            channels_first(x[:, there].flatten(0, 1)),
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
    """Temporal taps of a kernel, the middle one first, each with its first input frame."""
    order = sorted(range(length), key=lambda tap: abs(tap - length // 2))
    return [(tap, halo + tap - length // 2) for tap in order]


def _overlap(start: int, frames: int, halo: int) -> tuple[slice, slice]:
    """Frames of the output, and those of the input that a tap adds to them."""
    first, last = max(0, -start), min(frames - 2 * halo, frames - start)
    return slice(first, last), slice(first + start, last + start)


def _conv_of_clips(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of whole clips `[N, T, H, W, C]`."""
    return _add(_conv_frames(x, weight, _same(weight)[1:]), bias)


class _FramesDepthwise(torch.autograd.Function):
    """`_conv_of_clips`, which keeps the clips alone for the backward pass."""

    forward = staticmethod(_conv_of_clips)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, padding = grad.contiguous(), _same(weight)[1:]
        return (
            _conv_frames(grad, weight.flip(2, 3, 4), padding),
            _conv_frames_weight_grad(grad, x, weight, padding),
            grad.sum((0, 1, 2, 3)) if ctx.needs_input_grad[2] else None,
        )


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
        clip, *corner = coordinates(index.view(-1, math.prod(unit)).amin(1), canvas)
        place, inside = clip.view(-1, 1, 1, 1), True
        for d, (first, u, h, size) in enumerate(zip(corner, unit, halo, canvas[1:], strict=True)):
            shape = [-1 if axis == d else 1 for axis in range(3)]
            along = torch.arange(-h, u + h, device=index.device).view(1, *shape)
            along = first.view(-1, 1, 1, 1) + along
            place, inside = place * size + along, inside & (along >= 0) & (along < size)
        nothing = math.prod(canvas)
        place = torch.where(inside, place, nothing)
        numbers = torch.arange(len(index), device=index.device)
        token = torch.full((nothing + 1,), len(index), device=index.device)
        rows = token.index_copy(0, index, numbers)[place]
        own = rows[cls._inner(halo)].flatten()
        order = torch.zeros_like(own).index_copy(0, own, numbers)
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
        return [0 if h else p for h, p in zip(self.halo[1:], _same(weight)[1:], strict=True)]

    def convolve(self, boxes: Tensor, weight: Tensor) -> Tensor:
        """Boxes to the tokens `[V, C]` of their units, convolved."""
        out = _conv_frames(boxes, weight, self.padding(weight), self.halo[0])
        return out.view(-1, out.shape[-1]).index_select(0, self.order)


def _conv_of_windows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    halo: tuple[int, ...],
    order: Tensor,
) -> Tensor:
    """Depthwise convolution of a clip's visible tokens; only around them anything is computed."""
    windows = Windows(rows, halo, order)
    return _add(windows.convolve(windows.gather(x), weight), bias)


class _WindowsDepthwise(torch.autograd.Function):
    """`_conv_of_windows`, which keeps the tokens alone for the backward pass.

    Backward is the same with the gradient.
    """

    forward = staticmethod(_conv_of_windows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, rows, halo, order = inputs
        ctx.save_for_backward(x, weight, rows, order)
        ctx.halo = halo

    @staticmethod
    def backward(ctx, grad):
        x, weight, rows, order = ctx.saved_tensors
        windows = Windows(rows, ctx.halo, order)
        boxes = windows.gather(grad)
        grad_weight = _conv_frames_weight_grad(
            windows.own(boxes), windows.gather(x), weight, windows.padding(weight), windows.halo[0]
        )
        grad_x = windows.convolve(boxes, weight.flip(2, 3, 4))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _call(kind: type[torch.autograd.Function], *args: object) -> Tensor:
    """A function with its lean backward pass, or as plain operations where nothing is kept."""
    x, weight = args[:2]
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # Traces can be saved, and functorch can vectorise, plain operations alone.
    vectorised = torch._C._functorch.peek_interpreter_stack() is not None
    if not differentiates or torch.jit.is_tracing() or vectorised:
        return kind.forward(*args)
    return kind.apply(*args)


class VisibleGrid(NamedTuple):
    """Positions of the visible tokens of one stage on that stage's grid.

    Attributes:
        index: `[N * B * U]`, rows of the flattened canvas, in the order of the tokens.
        canvas: `(N, *grid)`.
        windows: of a clip, what lies around its mask units.
        token_map: on a GPU, the token at each place; see `depthwise_triton.token_map`.
    """

    index: Tensor
    canvas: tuple[int, ...]
    windows: Windows | None = None
    token_map: Tensor | None = None

    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve tokens `[N, B, U, C]` on their grid, with zeros where nothing is visible.

        Args:
            x: computed in its own type, under autocast too.
            weight: `[C, 1, *kernel]`.
            bias: `[C]`, or None.
        """
        weight, bias, tokens = weight.to(x.dtype), _cast(bias, x), x.flatten(0, 2)
        if self.token_map is not None:
            out = depthwise_triton.depthwise(tokens, weight, bias, self.index, self.token_map)
        elif self.windows is None:
            out = _call(_VisibleDepthwiseConv, tokens, weight, bias, self.index, self.canvas)
        else:
            out = _call(_WindowsDepthwise, tokens, weight, bias, *self.windows)
        return out.view_as(x)


class DenseGrid:
    """All tokens of a stage on their grid, `[N, *grid, C]`: nothing is masked."""

    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve tokens `[N, *grid, C]`; arguments as `VisibleGrid.depthwise` takes them."""
        if x.ndim == 5:
            return _call(_FramesDepthwise, x, weight.to(x.dtype), _cast(bias, x))
        x, padding = channels_first(x), _same(weight)
        return channels_last(F.conv2d(x, weight, bias, padding=padding, groups=len(weight)))
