"""ConvViT, the hybrid convolution-transformer encoder of ConvMAE (arXiv 2205.03892, section 3.1).

Three stages at 1/4, 1/8 and 1/16 of the input: convolution blocks in the first two, transformer
blocks in the third. The number of spatial dimensions is the length of `img_size`; nothing below
counts them.

A tensor of this file has one of two layouts:

- a *grid*, `[N, C, *size]`: what convolutions know, the layout of the published code;
- *tokens in nested blocks*, `[N, B, U, C]`: `B` blocks, a block being everything under one
  stage-3 token, with its `U` tokens in nested order (stage-2 cell by stage-2 cell, in each
  stage-1 cell by stage-1 cell). Each patch embedding then merges neighbours by a reshape, and
  choosing which blocks to compute is plain indexing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# Of the transformer blocks, the final norms and the decoder; the stages before keep eps 1e-5.
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Geometry:
    """The input's size and the stages' strides, checked to fit each other.

    Attributes:
        img_size: input size in pixels, one entry a spatial dimension.
        patch_size: for each stage its stride along each dimension.
    """

    img_size: tuple[int, ...]
    patch_size: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, img_size: int | Sequence[int], patch_size: Sequence[int | Sequence[int]]
    ) -> "Geometry":
        """Expand integers to one entry a dimension; a bare `img_size` is a square image.

        Raises:
            ValueError: not three stages, entries of different lengths, or a size that the strides
                do not divide.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        ndim = len(size)
        patch = tuple((p,) * ndim if isinstance(p, int) else tuple(p) for p in patch_size)
        if len(patch) != 3 or any(len(p) != ndim for p in patch):
            raise ValueError(
                f"patch_size {patch_size} does not fit img_size {size}: "
                f"it takes three entries (one a stage), each an int or {ndim} ints"
            )
        if min(min(p) for p in (size, *patch)) < 1:
            raise ValueError(f"img_size {size} and patch_size {patch_size} must be positive")
        strides = tuple(math.prod(p) for p in zip(*patch, strict=True))
        if any(s % stride for s, stride in zip(size, strides, strict=True)):
            raise ValueError(
                f"img_size {'x'.join(map(str, size))} is not divisible by the patch of "
                f"{'x'.join(map(str, strides))} pixels that patch_size {patch_size} makes"
            )
        return cls(size, patch)

    @property
    def ndim(self) -> int:
        """Spatial dimensions."""
        return len(self.img_size)

    def stride(self, stage: int) -> tuple[int, ...]:
        """Input pixels per token of `stage` (0 is the input, 3 the last) along each dimension."""
        return tuple(math.prod(p[d] for p in self.patch_size[:stage]) for d in range(self.ndim))

    def grid(self, stage: int) -> tuple[int, ...]:
        """Tokens of `stage` along each dimension."""
        return tuple(s // p for s, p in zip(self.img_size, self.stride(stage), strict=True))

    @property
    def num_patches(self) -> int:
        """Tokens of stage 3 (`L`)."""
        return math.prod(self.grid(3))

    def visible_patches(self, mask_ratio: float) -> int:
        """Stage-3 tokens that stay when a share of them is removed, `int(L * (1 - ratio))`.

        Raises:
            ValueError: a ratio that removes nothing or everything.
        """
        keep = int(self.num_patches * (1 - mask_ratio))
        if not 0 < keep < self.num_patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} keeps {keep} of {self.num_patches} patches: "
                f"at least one must stay and one must go"
            )
        return keep

    @property
    def patch_pixels(self) -> int:
        """Input pixels under one stage-3 token."""
        return math.prod(self.stride(3))


def to_nested_blocks(x: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """View a grid as nested blocks, without a copy.

    Args:
        x: `[N, C, *size]`.
        units: the nesting from the outside in: a block is `units[0]` cells along each dimension,
            a cell is `units[1]` smaller cells, and so on down to single positions.

    Returns:
        `[N, *blocks, *units[0], *units[1], …, C]`, a view.
    """
    ndim, depth = x.ndim - 2, len(units) + 1
    shape = []
    for d, size in enumerate(x.shape[2:]):
        inner = [unit[d] for unit in units]
        shape += [size // math.prod(inner), *inner]
    order = [2 + d * depth + level for level in range(depth) for d in range(ndim)]
    return x.reshape(*x.shape[:2], *shape).permute(0, *order, 1)


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
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
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
            [True, True, True],
        )
        return _gather(grad_input, index), grad_weight, grad_bias, None, None


def _scatter(x: Tensor, index: Tensor, canvas: tuple[int, ...]) -> Tensor:
    """Tokens `[T, C]` onto a zero canvas `[N, C, *grid]` (channels last in memory)."""
    rows = x.new_zeros(math.prod(canvas), x.shape[1]).index_copy(0, index, x)
    return rows.view(*canvas, -1).movedim(-1, 1)


def _gather(grid: Tensor, index: Tensor) -> Tensor:
    """The tokens `[T, C]` of a grid `[N, C, *grid]` that lie at `index`."""
    return grid.movedim(1, -1).reshape(-1, grid.shape[1]).index_select(0, index)


class VisibleGrid(NamedTuple):
    """Where the visible tokens of one stage lie on that stage's grid.

    Attributes:
        index: `[N * B * U]`, rows of the flattened canvas, in the order of the tokens.
        canvas: `(N, *grid)`.
    """

    index: Tensor
    canvas: tuple[int, ...]

    def depthwise(self, x: Tensor, conv: nn.Module) -> Tensor:
        """Apply a depthwise convolution to tokens `[N, B, U, C]`; what is not visible is zero."""
        weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
        out = _VisibleDepthwiseConv.apply(x.flatten(0, 2), weight, bias, self.index, self.canvas)
        return out.view_as(x)


def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of a grid `[N, C, *size]`."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def conv_as_linear(x: Tensor, conv: nn.Module, units: Sequence[Sequence[int]] = ()) -> Tensor:
    """A convolution with kernel = stride, on tokens whose kernels lie contiguous in memory.

    Args:
        x: `[N, B, U * K, C_in]`, the `K` positions under one kernel being neighbours.
        conv: weight `[C_out, C_in, *kernel]`.
        units: the nesting of those positions where it is deeper than row by row, as
            `to_nested_blocks` takes it.

    Returns:
        `[N, B, U, C_out]`.
    """
    weight = to_nested_blocks(conv.weight, units).flatten(1)  # [C_out, K * C_in]
    return F.linear(x.reshape(*x.shape[:2], -1, weight.shape[1]), weight, conv.bias)


class PatchEmbed(nn.Module):
    """Strided convolution (kernel = stride), LayerNorm over channels, GELU."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        patch_size = tuple(patch_size)
        self.proj = CONV[len(patch_size)](in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C_in, *size]` to `[N, C, *size / patch]`."""
        return self.act(channel_norm(self.proj(x), self.norm))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """`[N, B, U * K, C_in]` to `[N, B, U, C]`."""
        return self.act(self.norm(conv_as_linear(x, self.proj)))


class ConvMlp(nn.Module):
    """Two 1×1 convolutions with GELU between."""

    def __init__(self, dim: int, hidden_dim: int, ndim: int) -> None:
        super().__init__()
        self.fc1 = CONV[ndim](dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.fc2 = CONV[ndim](hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, *size]` to the same shape."""
        return self.fc2(self.act(self.fc1(x)))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """`[N, B, U, C]` to the same shape."""
        return conv_as_linear(self.act(conv_as_linear(x, self.fc1)), self.fc2)


class ConvBlock(nn.Module):
    """The block of stages 1 and 2: a 5×5 depthwise convolution takes the place of attention.

    `forward` is the published form on a grid, with block-wise masking when a mask is given; it
    computes everything, visible or not. `forward_tokens` computes the same for visible tokens
    alone (paper section 3.2).
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        kernel_size: Sequence[int] = (5, 5),
    ) -> None:
        super().__init__()
        conv, kernel_size = CONV[len(kernel_size)], tuple(kernel_size)
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = conv(dim, dim, 1)
        self.conv2 = conv(dim, dim, 1)
        padding = tuple(k // 2 for k in kernel_size)
        self.attn = conv(dim, dim, kernel_size, padding=padding, groups=dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), len(kernel_size))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The dense form.

        Args:
            x: `[N, C, *size]`.
            mask: `[N, 1, *size]`, 1 where removed, 0 where visible; None for no masking.

        Returns:
            `[N, C, *size]`. Removed positions hold numbers that no visible one depends on.
        """
        y = self.conv1(channel_norm(x, self.norm1))
        if mask is not None:
            y = y * (1 - mask)
        x = x + self.drop_path(self.conv2(self.attn(y)))
        return x + self.drop_path(self.mlp(channel_norm(x, self.norm2)))

    def forward_tokens(self, x: Tensor, visible: VisibleGrid) -> Tensor:
        """The visible-only form: `[N, B, U, C]` to the same shape."""
        y = visible.depthwise(conv_as_linear(self.norm1(x), self.conv1), self.attn)
        x = x + self.drop_path(conv_as_linear(y, self.conv2))
        return x + self.drop_path(self.mlp.forward_tokens(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention with a qkv bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, L, C]` to the same shape."""
        # [N, L, 3C] -> [N, L, 3, heads, C / heads] -> three of [N, heads, L, C / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, L, C]` to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvViTEncoder(nn.Module):
    """Patch embeddings, position embedding and blocks of the three stages; no head, no decoder.

    Args:
        img_size: input size in pixels, an int for a square image or one entry a dimension.
        patch_size: stride of each stage, ints or one entry a dimension.
        in_chans: channels of the input.
        embed_dim: width of each stage.
        depth: blocks of each stage.
        num_heads: attention heads of stage 3.
        mlp_ratio: hidden width of the MLPs over the stage's width, for each stage.
        drop_path_rate: stochastic depth, linear from 0 over all blocks of all stages.
        norm_layer: LayerNorm of stage 3 and after; the stages before always use eps 1e-5.

    Raises:
        ValueError: a size, stride or width that does not divide, or a list that is not one entry
            a stage.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: Sequence[int | Sequence[int]] = (4, 2, 2),
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("depth", depth), ("mlp_ratio", mlp_ratio)):
            if len(value) != 3:
                raise ValueError(f"{name} {tuple(value)} must have three entries, one a stage")
        self.geometry = geometry = Geometry.of(img_size, patch_size)
        self.in_chans = in_chans
        self.embed_dim = tuple(embed_dim)
        kernel = (5,) * geometry.ndim
        rates = iter(torch.linspace(0, drop_path_rate, sum(depth)).tolist())

        self.pos_embed = nn.Parameter(torch.zeros(1, geometry.num_patches, embed_dim[2]))
        chans = (in_chans, *embed_dim[:2])
        self.patch_embed1, self.patch_embed2, self.patch_embed3 = (
            PatchEmbed(c, dim, patch)
            for c, dim, patch in zip(chans, embed_dim, geometry.patch_size, strict=True)
        )
        self.patch_embed4 = nn.Linear(embed_dim[2], embed_dim[2])
        self.blocks1, self.blocks2 = (
            nn.ModuleList(
                ConvBlock(embed_dim[s], mlp_ratio[s], next(rates), kernel) for _ in range(depth[s])
            )
            for s in (0, 1)
        )
        self.blocks3 = nn.ModuleList(
            Block(embed_dim[2], num_heads, mlp_ratio[2], next(rates), norm_layer)
            for _ in range(depth[2])
        )
        # For stages 1 and 2 the grid position of each token in nested order, [L, U].
        for stage in (1, 2):
            grid = geometry.grid(stage)
            positions = torch.arange(math.prod(grid)).view(1, 1, *grid)
            nested = to_nested_blocks(positions, geometry.patch_size[stage:][::-1])
            self.register_buffer(
                f"grid_index{stage}", nested.reshape(geometry.num_patches, -1), persistent=False
            )

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless `x` is `[N, in_chans, *img_size]`."""
        expected = (self.in_chans, *self.geometry.img_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"input of shape {tuple(x.shape)} does not fit a model of img_size "
                f"{self.geometry.img_size} with {self.in_chans} channels: "
                f"expected [N, {', '.join(map(str, expected))}]"
            )

    def visible_grid(self, ids_keep: Tensor, stage: int) -> VisibleGrid:
        """Where the tokens of the blocks `ids_keep` `[N, B]` lie on the grid of `stage`."""
        grid = self.geometry.grid(stage)
        index = getattr(self, f"grid_index{stage}")[ids_keep]  # [N, B, U]
        image = torch.arange(len(ids_keep), device=index.device).view(-1, 1, 1)
        index = index + image * math.prod(grid)
        return VisibleGrid(index.flatten(), (len(ids_keep), *grid))

    def visible_blocks(self, imgs: Tensor, ids_keep: Tensor) -> Tensor:
        """The pixels of the blocks `ids_keep` `[N, B]` in nested order: `[N, B, pixels, C]`."""
        blocks = to_nested_blocks(imgs, self.geometry.patch_size[::-1])
        image = torch.arange(len(imgs), device=imgs.device).unsqueeze(1)
        block = torch.unravel_index(ids_keep, self.geometry.grid(3))
        return blocks[(image, *block)].flatten(2, -2)

    def forward_visible(self, imgs: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stages for the visible blocks alone, exactly as if the rest were masked.

        Args:
            imgs: `[N, in_chans, *img_size]`.
            ids_keep: `[N, B]`, the visible stage-3 tokens of each image.

        Returns:
            Tokens after stage 1 `[N, B, U1, C1]`, stage 2 `[N, B, U2, C2]` and stage 3
            `[N, B, C3]`.
        """
        x = self.patch_embed1.forward_tokens(self.visible_blocks(imgs, ids_keep))
        visible = self.visible_grid(ids_keep, 1)
        for block in self.blocks1:
            x = block.forward_tokens(x, visible)
        stage1 = x

        x = self.patch_embed2.forward_tokens(x)
        visible = self.visible_grid(ids_keep, 2)
        for block in self.blocks2:
            x = block.forward_tokens(x, visible)
        stage2 = x

        x = self.patch_embed4(self.patch_embed3.forward_tokens(x)).flatten(1, 2)
        x = x + self.pos_embed[0][ids_keep]
        for block in self.blocks3:
            x = block(x)
        return stage1, stage2, x
