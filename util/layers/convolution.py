"""Convolutions of tokens with channels last, under the parameter names and shapes of the originals.

The parameters, and so checkpoints and initial values, are those of torch's convolutions.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from util.layers.depthwise import DenseGrid, VisibleGrid
from util.layers.geometry import to_nested_blocks


class _Pointwise:
    """A convolution with a kernel of one position: a linear map of each token."""

    def forward(self, x: Tensor) -> Tensor:
        """`[…, C_in]` to `[…, C_out]`."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class _Strided:
    """A convolution whose kernel is its stride: a linear map of the tokens under one kernel.

    Attributes:
        units: the nesting of those tokens where it is deeper than row by row, as
            `to_nested_blocks` takes it.
    """

    units: Sequence[Sequence[int]] = ()

    def forward(self, x: Tensor) -> Tensor:
        """`[…, K, C_in]`, the `K` positions under a kernel, to `[…, C_out]`."""
        if x.shape[-2] == 1:
            # No reordering, so that the gradient has the weight's own strides, which DDP prefers.
            return F.linear(x.squeeze(-2), self.weight.flatten(1), self.bias)
        weight = to_nested_blocks(self.weight, self.units).flatten(1)  # [C_out, K * C_in]
        return F.linear(x.flatten(-2), weight, self.bias)


class _Depthwise:
    """A depthwise convolution of tokens that lie on a grid."""

    def forward(self, x: Tensor, grid: VisibleGrid | DenseGrid) -> Tensor:
        """Tokens `[…, C]`, as `grid` lays them out, to the same shape."""
        return grid.depthwise(x, self.weight, self.bias)


class PointwiseConv2d(_Pointwise, nn.Conv2d):
    """1×1 convolution of tokens."""


class PointwiseConv3d(_Pointwise, nn.Conv3d):
    """1×1×1 convolution of tokens."""


class StridedConv2d(_Strided, nn.Conv2d):
    """Convolution of tokens with kernel = stride, in two dimensions."""


class StridedConv3d(_Strided, nn.Conv3d):
    """Convolution of tokens with kernel = stride, in three dimensions."""


class DepthwiseConv2d(_Depthwise, nn.Conv2d):
    """Depthwise convolution of tokens on a grid of two dimensions."""


class DepthwiseConv3d(_Depthwise, nn.Conv3d):
    """Depthwise convolution of tokens on a grid of three dimensions."""


def pointwise_conv(ndim: int, dim_in: int, dim_out: int) -> PointwiseConv2d | PointwiseConv3d:
    """A 1×1 convolution for `ndim` dimensions."""
    return {2: PointwiseConv2d, 3: PointwiseConv3d}[ndim](dim_in, dim_out, 1)


def strided_conv(
    dim_in: int, dim_out: int, stride: Sequence[int], units: Sequence[Sequence[int]] = ()
) -> StridedConv2d | StridedConv3d:
    """A convolution with kernel = stride, one entry a dimension; `units` as in its class."""
    stride = tuple(stride)
    conv = {2: StridedConv2d, 3: StridedConv3d}[len(stride)](dim_in, dim_out, stride, stride)
    conv.units = units
    return conv


def depthwise_conv(dim: int, kernel_size: Sequence[int]) -> DepthwiseConv2d | DepthwiseConv3d:
    """A depthwise convolution that keeps the grid's size; odd kernel, one entry a dimension."""
    kernel = tuple(kernel_size)
    padding = tuple(k // 2 for k in kernel)
    kind = {2: DepthwiseConv2d, 3: DepthwiseConv3d}[len(kernel)]
    return kind(dim, dim, kernel, padding=padding, groups=dim)
