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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor

from util.errors import UsageError
from util.layers import depthwise_triton
from util.layers.architecture import SIZES
from util.layers.convolution import depthwise_conv, pointwise_conv, strided_conv
from util.layers.depthwise import DenseGrid, VisibleGrid, Windows
from util.layers.geometry import (
    Geometry,
    channels_first,
    channels_last,
    coordinates,
    to_cells,
    to_nested_blocks,
)
from util.layers.pos_embed import resize_pos_embed
from util.layers.recompute import apply_recomputed
from util.weights.load import Report, load_weights
from util.weights.read import Weights, read_weights

# Of the transformer blocks, the final norms and the decoder; the stages before keep eps 1e-5.
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Strided convolution (kernel = stride), LayerNorm over channels, GELU."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.proj = strided_conv(in_chans, embed_dim, patch_size)
        self.norm = nn.LayerNorm(embed_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[…, K, C_in]`, the `K` positions under one patch, to `[…, C]`."""
        return self.act(self.norm(self.proj(x)))


class Mlp(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[…, C]` to the same shape."""
        return apply_recomputed(F.gelu, self.fc2, self.fc1(x))


class ConvMlp(Mlp):
    """`Mlp` of 1×1 convolutions."""

    def __init__(self, dim: int, hidden_dim: int, ndim: int) -> None:
        nn.Module.__init__(self)
        self.fc1 = pointwise_conv(ndim, dim, hidden_dim)
        self.fc2 = pointwise_conv(ndim, hidden_dim, dim)


class ConvBlock(nn.Module):
    """The block of stages 1 and 2: a 5×5 depthwise convolution takes the place of attention."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        kernel_size: Sequence[int] = (5, 5),
    ) -> None:
        super().__init__()
        ndim = len(kernel_size)
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = pointwise_conv(ndim, dim, dim)
        self.conv2 = pointwise_conv(ndim, dim, dim)
        self.attn = depthwise_conv(dim, kernel_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), ndim)

    def forward(self, x: Tensor, grid: VisibleGrid | DenseGrid) -> Tensor:
        """Convolve and transform tokens.

        Args:
            x: `[…, C]`, as `grid` lays tokens out.
            grid: places of the tokens; where none is visible the convolution sees zeros, which is
                the published masked convolution (paper section 3.2).

        Returns:
            The same shape.
        """
        y = self.attn(apply_recomputed(self.norm1, self.conv1, x), grid)
        x = x + self.drop_path(self.conv2(y))
        return x + self.drop_path(apply_recomputed(self.norm2, self.mlp, x))


class Attention(nn.Module):
    """Multi-head self-attention with a qkv bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend within `x`.

        Args:
            x: `[N, L, C]`.
            bias: added to the attention logits, broadcastable to `[N, heads, L, L]`: relative
                positions, or -inf where a token must not look.

        Returns:
            `[N, L, C]`.
        """
        q, k, v = self.split_heads(x)
        return self.merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))

    def split_heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values of tokens `[N, L, C]`: `[3, N, heads, L, C / heads]`."""
        # [N, L, 3C] -> [N, L, 3, heads, C / heads]
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def merge_heads(self, y: Tensor) -> Tensor:
        """Merge the heads' outputs `[N, heads, L, C / heads]` and project: `[N, L, C]`."""
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

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[N, L, C]` to the same shape; `bias` as `Attention` takes it."""
        x = x + self.drop_path(apply_recomputed(self.norm1, self.attn, x, bias))
        return x + self.drop_path(apply_recomputed(self.norm2, self.mlp, x))


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
        kernel_size: extent in space of the depthwise convolutions, odd.
        temporal_kernel: extent in time of those of a video model, odd.
        drop_path_rate: stochastic depth, linear from 0 over all blocks of all stages.
        norm_layer: LayerNorm of stage 3 and after; the stages before always use eps 1e-5.
        block: makes the blocks of stage 3, from the arguments of `Block`.

    Attributes:
        num_prefix_tokens: 1 with a class token (`add_class_token`), 0 without.

    Raises:
        ValueError: a size, stride or width that does not divide, or a list that is not one entry
            a stage.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: Sequence[int | Sequence[int]] = (4, 2, 2),
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        kernel_size: int = 5,
        temporal_kernel: int = 3,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        block: Callable[..., Block] = Block,
    ) -> None:
        super().__init__()
        for name, extent in (("kernel_size", kernel_size), ("temporal_kernel", temporal_kernel)):
            if extent < 1 or extent % 2 == 0:
                raise ValueError(f"{name} {extent} must be odd")
        for name, value in (("embed_dim", embed_dim), ("depth", depth), ("mlp_ratio", mlp_ratio)):
            if len(value) != 3:
                raise ValueError(f"{name} {tuple(value)} must have three entries, one a stage")
        self.geometry = geometry = Geometry.of(img_size, patch_size)
        if geometry.ndim == 3 and temporal_kernel // 2 > geometry.grid(1)[0]:
            raise ValueError(
                f"temporal_kernel {temporal_kernel} is longer than a clip of "
                f"{geometry.img_size[0]} frames in {geometry.grid(1)[0]} cubes"
            )
        self.grad_checkpointing = False
        self.in_chans = in_chans
        self.embed_dim = tuple(embed_dim)
        self.kernel = kernel = (temporal_kernel, kernel_size, kernel_size)[-geometry.ndim :]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depth), device="cpu").tolist())

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
            block(embed_dim[2], num_heads, mlp_ratio[2], next(rates), norm_layer)
            for _ in range(depth[2])
        )
        # For stages 1 and 2 the grid position of each token in nested order, [L, U].
        for stage in (1, 2):
            grid = geometry.grid(stage)
            positions = torch.arange(math.prod(grid)).view(1, 1, *grid)
            nested = to_nested_blocks(positions, geometry.nesting(stage))
            self.register_buffer(
                f"grid_index{stage}", nested.reshape(geometry.num_patches, -1), persistent=False
            )

    def add_class_token(self) -> None:
        """Put a learnable token before those of the grid, with a row of the position table."""
        dim = self.embed_dim[2]
        self.num_prefix_tokens = 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.geometry.num_patches, dim))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def _call(self, block: nn.Module, *args: object) -> Tensor:
        """A block's output; its activations are kept, or computed again in the backward pass."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args)
        return block(*args)

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
        """Grid positions of the tokens of the blocks `ids_keep` `[N, B]` at `stage`."""
        grid = self.geometry.grid(stage)
        index = getattr(self, f"grid_index{stage}")[ids_keep]  # [N, B, U]
        image = torch.arange(len(ids_keep), device=index.device).view(-1, 1, 1)
        index = (index + image * math.prod(grid)).flatten()
        canvas, windows = (len(ids_keep), *grid), None
        if depthwise_triton.is_supported(index):
            return VisibleGrid(index, canvas, token_map=depthwise_triton.token_map(index, canvas))
        if self.geometry.ndim == 3:
            cells = zip(self.geometry.mask_unit, grid, self.geometry.grid(3), strict=True)
            unit = [u * g // g3 for u, g, g3 in cells]
            windows = Windows.around(index, canvas, unit, self.kernel)
        return VisibleGrid(index, canvas, windows)

    def visible_blocks(self, imgs: Tensor, ids_keep: Tensor) -> Tensor:
        """The pixels of the blocks `ids_keep` `[K * N, B]` of `N` images, mask-major.

        They are in nested order: `[K * N, B, pixels, C]`.
        """
        blocks = to_nested_blocks(imgs, self.geometry.nesting(0))
        image = (torch.arange(len(ids_keep), device=imgs.device) % len(imgs)).unsqueeze(1)
        block = coordinates(ids_keep, self.geometry.grid(3))
        return blocks[(image, *block)].flatten(2, -2)

    def under_patches(self, x: Tensor, stage: int) -> Tensor:
        """Tokens in nested blocks, `[N, B, U * K, C]`, by patches of `stage`: `[N, B, U, K, C]`."""
        return x.unflatten(-2, (-1, math.prod(self.geometry.patch_size[stage - 1])))

    def forward_visible(self, imgs: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three stages for the visible blocks alone, exactly as if the rest were masked.

        Args:
            imgs: `[N, in_chans, *img_size]`.
            ids_keep: `[K * N, B]`, the visible stage-3 tokens of each of the `K` masks of each
                image, mask-major, mask unit by mask unit.

        Returns:
            Tokens after stage 1 `[K * N, B, U1, C1]`, stage 2 `[K * N, B, U2, C2]` and stage 3
            `[K * N, prefix + B, C3]`.
        """
        x = self.patch_embed1(self.under_patches(self.visible_blocks(imgs, ids_keep), 1))
        visible = self.visible_grid(ids_keep, 1)
        for block in self.blocks1:
            x = self._call(block, x, visible)
        stage1 = x

        x = self.patch_embed2(self.under_patches(x, 2))
        visible = self.visible_grid(ids_keep, 2)
        for block in self.blocks2:
            x = self._call(block, x, visible)
        stage2 = x

        x = self.patch_embed4(self.patch_embed3(self.under_patches(x, 3))).flatten(1, 2)
        x = x + self.pos_embed[0, -self.geometry.num_patches :][ids_keep]
        if self.num_prefix_tokens:
            token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks3:
            x = self._call(block, x)
        return stage1, stage2, x


class ConvViT(ConvViTEncoder):
    """The encoder as an image classifier and multi-scale backbone, with timm's interface.

    Args:
        num_classes: outputs of the head; 0 for none.
        global_pool: "avg" (mean over the tokens, then `fc_norm`) or "token" (`norm`, then the
            first token: how the published probe ran without `--global_pool`). True and False, as
            the published code has it, mean these two.
        class_token: a learnable token before those of the grid, as the v2 checkpoints have it.
        drop_rate: dropout before the head.
        norm_layer: LayerNorm of stage 3 and after; the stages before always use eps 1e-5.
        **encoder: the rest of the encoder's arguments.

    Raises:
        ValueError: another pooling, or sizes that do not divide.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        global_pool: str | bool = "avg",
        class_token: bool = False,
        drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        **encoder,
    ) -> None:
        super().__init__(norm_layer=norm_layer, **encoder)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim[2]
        self.num_stages = 3
        self._norm_layer = norm_layer
        self.feature_info = [
            dict(num_chs=dim, reduction=self.geometry.stride(stage)[-1], module=f"blocks{stage}")
            for stage, dim in enumerate(self.embed_dim, start=1)
        ]
        if class_token:
            self.add_class_token()
        self._make_norm(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(self._initialize)
        for table in [self.pos_embed, *([self.cls_token] if class_token else [])]:
            nn.init.trunc_normal_(table, std=0.02)

    def _make_norm(self, global_pool: str | bool) -> None:
        """The norm of a pooling mode, under the name that the published checkpoints use."""
        pool = {True: "avg", False: "token"}.get(global_pool, global_pool)
        if pool not in ("avg", "token"):
            raise ValueError(f"global_pool {global_pool!r} must be 'avg' or 'token'")
        self.global_pool = pool
        norm = self._norm_layer(self.num_features)
        self.norm = norm if pool == "token" else nn.Identity()
        self.fc_norm = norm if pool == "avg" else nn.Identity()

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """A classifier from scratch: truncated normal, zero biases."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside the 1-d ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise decay: embeddings and stages 1 and 2 are the stem."""
        stem = r"^cls_token|^pos_embed|^patch_embed|^blocks[12]"
        return {
            "stem": stem,
            "blocks": [(r"^blocks3\.(\d+)", None), (r"^norm|^fc_norm|^head", (1000,))],
        }

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, and the pooling with its norm if one is named."""
        if global_pool is not None and global_pool != self.global_pool:
            self._make_norm(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(self._initialize).to(next(self.parameters()))

    def add_probe_norm(self, norm: type[nn.BatchNorm1d] = nn.BatchNorm1d) -> None:
        """Put a batch norm without affine before the head: a linear probe's (MAE, appendix A)."""
        self.head = nn.Sequential(norm(self.num_features, affine=False, eps=1e-6), self.head)

    def position_embedding(self, grid: Sequence[int]) -> Tensor:
        """The table `[1, tokens, C]`, resized if the grid is not the one it was made for."""
        size = self.geometry.grid(3)
        if tuple(grid) == size:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, size, grid, self.num_prefix_tokens)

    def forward_stages(self, x: Tensor, stages: int = 3) -> list[Tensor]:
        """The outputs of the first stages.

        Args:
            x: `[N, in_chans, *size]`, any size that the strides divide.
            stages: how many to run.

        Returns:
            `[N, *grid, C]` of stages 1 and 2; tokens `[N, prefix + L, C]` of stage 3.

        Raises:
            ValueError: a size that the strides do not divide, or another number of channels.
        """
        self._check_strides(x)
        stages = min(stages, self.num_stages)
        x = channels_last(x)
        outputs = []
        patch1, patch2, patch3 = self.geometry.patch_size
        convolutional = (
            (patch1, self.patch_embed1, self.blocks1),
            (patch2, self.patch_embed2, self.blocks2),
        )
        for patch, patch_embed, blocks in convolutional[:stages]:
            x = patch_embed(to_cells(x, patch))
            for block in blocks:
                x = self._call(block, x, DenseGrid())
            outputs.append(x)
        if stages == 3:
            x = self.patch_embed4(self.patch_embed3(to_cells(x, patch3)))
            grid = x.shape[1:-1]
            x = x.flatten(1, -2)  # [N, L, C]
            if self.num_prefix_tokens:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            outputs.append(self.forward_blocks3(x + self.position_embedding(grid), grid))
        return outputs

    def forward_blocks3(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """The transformer blocks: tokens `[N, prefix + L, C]` of a grid to the same shape.

        To override where attention depends on the grid.
        """
        for block in self.blocks3:
            x = self._call(block, x)
        return x

    def _check_strides(self, x: Tensor) -> None:
        stride = self.geometry.stride(3)
        if x.ndim != 2 + self.geometry.ndim or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input of shape {tuple(x.shape)} is no batch of images of {self.in_chans} "
                f"channels and {self.geometry.ndim} dimensions"
            )
        if any(s % p for s, p in zip(x.shape[2:], stride, strict=True)):
            raise ValueError(
                f"input of {'x'.join(map(str, x.shape[2:]))} pixels is not divisible by the "
                f"model's patch of {'x'.join(map(str, stride))}"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[N, in_chans, *size]` to the last stage's tokens `[N, prefix + L, C]`."""
        return self.norm(self.forward_stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits `[N, num_classes]`, or to what the head sees, `[N, C]`."""
        x = x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == "avg" else x[:, 0]
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[N, in_chans, *size]` to logits `[N, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, as timm's models give them.

        Args:
            x: `[N, in_chans, *size]`.
            indices: stages 0, 1, 2 to take; an int for the last so many, None for all.
            norm: normalise the last stage's.
            stop_early: run no stage after the last one taken.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final tokens.

        Returns:
            The maps, or (the output of the last stage that was run, the maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW' or 'NHWC'")
        taken, last = feature_take_indices(3, indices)
        outputs = self.forward_stages(x, last + 1 if stop_early or intermediates_only else 3)
        maps = []
        for i in taken:
            grid = outputs[i]
            if i == 2:
                grid = self.norm(grid) if norm else grid
                size = [s // p for s, p in zip(x.shape[2:], self.geometry.stride(3), strict=True)]
                grid = grid[:, self.num_prefix_tokens :].unflatten(1, size)
            maps.append(channels_first(grid) if output_fmt == "NCHW" else grid)
        if intermediates_only:
            return maps
        return (self.norm(outputs[-1]) if len(outputs) == 3 else outputs[-1]), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` of these stages does not need; return their indices."""
        taken, last = feature_take_indices(3, indices)
        self.num_stages = last + 1
        if last < 2:
            self.patch_embed3 = self.patch_embed4 = nn.Identity()
            self.blocks3 = nn.ModuleList()
            self.pos_embed = None
        if last < 1:
            self.patch_embed2, self.blocks2 = nn.Identity(), nn.ModuleList()
        if prune_norm or last < 2:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return taken


# What begins anew where an encoder becomes a classifier.
NEW_IN_CLASSIFIER = ("head", "norm", "fc_norm")


def convvit_from_weights(
    weights: Weights, num_classes: int | None = None, **kwargs
) -> tuple[ConvViT, Report]:
    """The model that weights belong to, its architecture read off their shapes, filled.

    Args:
        weights: of a pretraining, an encoder, a classifier or a probe.
        num_classes: None for the model as it was trained (without a head if it had none); a
            number for one that goes on learning, whose head begins anew unless it fits.
        **kwargs: override arguments of `ConvViT`, such as `img_size`, `drop_path_rate` and
            `global_pool` (default: as trained; "avg" for what had no head).

    Returns:
        The model, with `data_cfg` as its `pretrained_cfg`, and how the weights were matched.

    Raises:
        UsageError: weights of something else, or arguments that do not fit them.
    """
    trained = weights.kind in ("classifier", "probe")
    kwargs = {"global_pool": weights.global_pool if trained else "avg", **kwargs}
    outputs = weights.num_classes if num_classes is None else num_classes
    kwargs = {**weights.architecture.kwargs(), **kwargs}
    try:
        model = ConvViT(num_classes=outputs, **kwargs)
    except ValueError as error:
        raise UsageError(f"checkpoint {weights.path}: {error}") from error
    if num_classes is None and weights.kind == "probe":
        model.add_probe_norm()
    as_trained = num_classes is None and trained
    report = load_weights(model, weights, new=() if as_trained else NEW_IN_CLASSIFIER)
    model.pretrained_cfg = data_cfg(model, weights)
    return model, report


def data_cfg(model: ConvViT, weights: Weights) -> dict:
    """The configuration that timm's `resolve_model_data_config` takes a model's images from.

    Empty of arrays, and of gray pictures and those with alpha by ImageNet's numbers.
    """
    mean, std = weights.stats or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if weights.args.get("arrays") or len(mean) != model.in_chans:
        return {}
    size = (model.in_chans, *model.geometry.img_size[-2:])
    return pretrained_cfg(num_classes=model.num_classes, input_size=size, mean=mean, std=std)


def convvit_from_checkpoint(path: str | Path, **kwargs) -> ConvViT:
    """The model of a checkpoint of any kind, with its weights.

    Args:
        path: a file of this framework or of the original code, or safetensors.
        **kwargs: as `convvit_from_weights` takes them.

    Raises:
        UsageError: a file that cannot be read, or weights of something else.
    """
    return convvit_from_weights(read_weights(path), **kwargs)[0]


def pretrained_cfg(**kwargs) -> dict:
    """A classifier's pretrained configuration in timm's format."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {f"convvit_{size}_patch16": pretrained_cfg() for size in SIZES}
)


class FeatureMaps(FeatureGetterNet):
    """The maps of the stages, which `timm.create_model(…, features_only=True)` gives.

    It takes the weights of a file as they are: what it has no use for is left aside.
    """

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load weights by the names of the encoder, or by the module's own.

        Raises:
            RuntimeError: some of the encoder's are missing or have another shape.
        """
        own = self.state_dict()
        if not own.keys() & state_dict.keys():
            there = {f"model.{name}": tensor for name, tensor in state_dict.items()}
            state_dict = {name: tensor for name, tensor in there.items() if name in own}
        return super().load_state_dict(state_dict, strict, assign)


def create_classifier(variant: str, pretrained: bool, sizes: dict, kwargs: dict) -> ConvViT:
    """A model as timm creates it; with `features_only` it gives the maps of the three stages.

    Args:
        variant: its name, one of the registered ones.
        pretrained: see `timm.create_model`.
        sizes: arguments of `ConvViT` that the name stands for.
        kwargs: override them.
    """
    kwargs, model = {**sizes, **kwargs}, ConvViT
    size = kwargs.get("img_size")
    if isinstance(size, Sequence) and len(size) == 3:  # timm's notes on a model know no frames
        model = partial(ConvViT, img_size=kwargs.pop("img_size"))
    features = {"out_indices": (0, 1, 2), "feature_cls": FeatureMaps}
    return build_model_with_cfg(model, variant, pretrained, feature_cfg=features, **kwargs)


@register_model
def convvit_tiny_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """Ours, for the demo and the tests. `kwargs` override any argument of `ConvViT`."""
    return create_classifier("convvit_tiny_patch16", pretrained, SIZES["tiny"], kwargs)


@register_model
def convvit_small_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """ConvViT-S. `kwargs` override any argument of `ConvViT`."""
    return create_classifier("convvit_small_patch16", pretrained, SIZES["small"], kwargs)


@register_model
def convvit_base_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """ConvViT-B, the paper's main model. `kwargs` override any argument of `ConvViT`."""
    return create_classifier("convvit_base_patch16", pretrained, SIZES["base"], kwargs)


@register_model
def convvit_large_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """ConvViT-L. `kwargs` override any argument of `ConvViT`."""
    return create_classifier("convvit_large_patch16", pretrained, SIZES["large"], kwargs)


@register_model
def convvit_huge_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """ConvViT-H. `kwargs` override any argument of `ConvViT`."""
    return create_classifier("convvit_huge_patch16", pretrained, SIZES["huge"], kwargs)


# Model name to factory, for command lines.
MODELS = {
    "convvit_tiny_patch16": convvit_tiny_patch16,
    "convvit_small_patch16": convvit_small_patch16,
    "convvit_base_patch16": convvit_base_patch16,
    "convvit_large_patch16": convvit_large_patch16,
    "convvit_huge_patch16": convvit_huge_patch16,
}
