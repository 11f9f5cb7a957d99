"""Depthwise convolution of visible tokens on a GPU, without a canvas: Triton kernels.

A token's neighbours are looked up in a map of the grid, so that nothing is computed, written or
read where nothing is visible. The result is that of `util.layers.depthwise`, up to rounding.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils._triton import has_triton_package

from util.layers.codegen import missing_for_compile

if has_triton_package():
    import triton
    import triton.language as tl
else:  # no GPU code then: `is_supported` says no
    triton = tl = None

TOKENS, CHANNELS, STRETCH = 16, 128, 256  # of a program; STRETCH tokens share a weight's sum


def is_supported(x: Tensor) -> bool:
    """Tell whether the kernels run on the device of `x`; not in a trace, not vectorised."""
    if triton is None or not x.is_cuda or torch.version.hip or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.compiler.is_compiling() or _runs_on(x.device)


@cache
def _runs_on(device: torch.device) -> bool:
    return not missing_for_compile(device)


def token_map(index: Tensor, canvas: Sequence[int]) -> Tensor:
    """The token at each place of a canvas, -1 for none.

    Args:
        index: `[T]`, the place of each token.
        canvas: `(N, *grid)`.

    Returns:
        `[N, *grid]`, int32.
    """
    numbers = torch.arange(len(index), device=index.device, dtype=torch.int32)
    places = math.prod(canvas)
    nowhere = torch.full((places,), -1, device=index.device, dtype=torch.int32)
    return nowhere.index_copy(0, index, numbers).view(*canvas)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, map_: Tensor
) -> Tensor:
    """Convolve tokens; where none is visible lie zeros.

    Args:
        x: `[T, C]`.
        weight: `[C, 1, *kernel]`, odd, in two or three dimensions; of the type of `x`.
        bias: `[C]`, or None.
        index: `[T]`, the place of each token on the flattened canvas.
        map_: `[N, *grid]`, see `token_map`.

    Returns:
        `[T, C]`.
    """
    kernel, grid = _three(weight.shape[2:]), _three(map_.shape[1:])
    taps = weight.flatten(1).t().contiguous()  # [K, C]
    with _current(x.device):
        out = torch.ops.convmae.depthwise(x.contiguous(), taps, index, map_, kernel, grid)
    return out if bias is None else out + bias


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the one that Triton starts kernels on; autograd and the compiler do it alone."""
    if torch.compiler.is_compiling() or torch.cuda.device_count() < 2:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _three(size: Sequence[int]) -> list[int]:
    """A size with a first dimension of one where it has two."""
    return [1] * (3 - len(size)) + list(size)


def _convolve(
    x: Tensor, taps: Tensor, index: Tensor, map_: Tensor, kernel: Sequence[int], grid: Sequence[int]
) -> Tensor:
    out, (tokens, channels) = torch.empty_like(x), x.shape
    programs = (triton.cdiv(tokens, TOKENS), triton.cdiv(channels, CHANNELS))
    sizes = (*grid, *kernel, TOKENS, CHANNELS, _accumulator(x))
    wrap_triton(_convolve_kernel)[programs](x, taps, index, map_, out, tokens, channels, *sizes)
    return out


def _weight_gradient(
    grad: Tensor, x: Tensor, index: Tensor, map_: Tensor, kernel: Sequence[int], grid: Sequence[int]
) -> Tensor:
    tokens, channels = x.shape
    stretches, taps = triton.cdiv(tokens, STRETCH), kernel[0] * kernel[1] * kernel[2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty(stretches, taps, channels, device=x.device, dtype=dtype)
    sizes = (*grid, *kernel, TOKENS, CHANNELS, STRETCH, _accumulator(x))
    wrap_triton(_weight_kernel)[(stretches, triton.cdiv(channels, CHANNELS))](
        grad, x, index, map_, sums, tokens, channels, *sizes
    )
    return sums.sum(0).to(x.dtype)


def _accumulator(x: Tensor) -> "tl.dtype":
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _keep(ctx, inputs, output):
    x, taps, index, map_, ctx.kernel, ctx.grid = inputs
    ctx.save_for_backward(x, taps, index, map_)


def _backward(ctx, grad):
    x, taps, index, map_ = ctx.saved_tensors
    grad = grad.contiguous()
    where = index, map_, ctx.kernel, ctx.grid
    # The gradient by the input is the same convolution with the kernel turned around.
    grad_x = torch.ops.convmae.depthwise(grad, taps.flip(0), *where)
    return grad_x, torch.ops.convmae.depthwise_weight(grad, x, *where), *([None] * 4)


if triton is not None:

    @triton.jit
    def _neighbours(
        map_ptr, place, x, y, z, in_range, tap,
        D: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
        KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ):  # fmt: skip
        """The tokens under a tap of the kernel around `place`, and where there are some."""
        dz = tap // (KH * KW) - KD // 2
        dy = tap // KW % KH - KH // 2
        dx = tap % KW - KW // 2
        inside = in_range & (x + dx >= 0) & (x + dx < W) & (y + dy >= 0) & (y + dy < H)
        inside = inside & (z + dz >= 0) & (z + dz < D)
        token = tl.load(map_ptr + place + (dz * H + dy) * W + dx, mask=inside, other=-1)
        return token.to(tl.int64), token >= 0

    @triton.jit
    def _convolve_kernel(
        x_ptr, taps_ptr, index_ptr, map_ptr, out_ptr, T, C,
        D: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
        KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        place = tl.load(index_ptr + t, mask=t < T, other=0).to(tl.int32)
        x, y, z = place % W, place // W % H, place // (W * H) % D
        total = tl.zeros([BT, BC], dtype=ACC)
        for tap in range(KD * KH * KW):
            token, seen = _neighbours(map_ptr, place, x, y, z, t < T, tap, D, H, W, KD, KH, KW)
            there = seen[:, None] & (c < C)[None, :]
            value = tl.load(x_ptr + token[:, None] * C + c[None, :], mask=there, other=0.0)
            weight = tl.load(taps_ptr + tap * C + c, mask=c < C, other=0.0)
            total += value.to(ACC) * weight.to(ACC)[None, :]
        own = (t < T)[:, None] & (c < C)[None, :]
        out = out_ptr + t.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=own)

    @triton.jit
    def _weight_kernel(
        grad_ptr, x_ptr, index_ptr, map_ptr, sums_ptr, T, C,
        D: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
        KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, STRETCH: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0) * STRETCH + tl.arange(0, BT)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        for tap in range(KD * KH * KW):
            total = tl.zeros([BT, BC], dtype=ACC)
            for step in range(STRETCH // BT):
                t = first + step * BT
                place = tl.load(index_ptr + t, mask=t < T, other=0).to(tl.int32)
                x, y, z = place % W, place // W % H, place // (W * H) % D
                token, seen = _neighbours(map_ptr, place, x, y, z, t < T, tap, D, H, W, KD, KH, KW)
                there = seen[:, None] & (c < C)[None, :]
                value = tl.load(x_ptr + token[:, None] * C + c[None, :], mask=there, other=0.0)
                grad = grad_ptr + t.to(tl.int64)[:, None] * C + c[None, :]
                total += value.to(ACC) * tl.load(grad, mask=there, other=0.0).to(ACC)
            row = (tl.program_id(0) * (KD * KH * KW) + tap).to(tl.int64) * C
            tl.store(sums_ptr + row + c, tl.sum(total, 0), mask=c < C)

    depthwise_op = triton_op("convmae::depthwise", mutates_args=())(_convolve)
    depthwise_op.register_autograd(_backward, setup_context=_keep)
    triton_op("convmae::depthwise_weight", mutates_args=())(_weight_gradient)
