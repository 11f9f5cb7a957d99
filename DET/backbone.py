"""ConvViT as a backbone for Detectron2's pyramids: window attention, images of any size.

Plain torch: without Detectron2 the classes work as they are, with it they are its `Backbone`s.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from models_convvit import Attention, ConvViT
from util.layers.pos_embed import get_sincos_pos_embed
from util.layers.rel_pos import RelativePositionBias, shifts_along_axis

try:
    from detectron2.modeling import Backbone
except ImportError:
    Backbone = nn.Module


class GridAttention(Attention):
    """Attention over a grid of tokens, all of it or window by window.

    A grid that windows do not cover evenly is padded at its right and bottom with zeros, which
    take part in the attention: so do ViTDet's, and the published detectors are trained with it.

    Args:
        dim: width.
        num_heads: attention heads.
        window_size: side of a window in tokens; 0 for the whole grid.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 0) -> None:
        super().__init__(dim, num_heads)
        self.window_size = window_size

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[N, H, W, C]` to the same shape; `bias` `[heads, L, L]` of a window's tokens."""
        if not self.window_size:
            return self.attend(x, bias)
        windows, padded = window_partition(x, self.window_size)  # [N * windows, side, side, C]
        y = self.attend(windows, bias)
        return window_unpartition(y, self.window_size, x.shape[1:3], padded)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention among all tokens of each grid `[N, H, W, C]`."""
        return super().forward(x.flatten(1, 2), bias).view_as(x)


class DecomposedAttention(GridAttention):
    """Grid attention with ViTDet's relative positions: a table for rows, a table for columns.

    The bias of a query and a key depends on the query, `q · rel_pos_h[shift of rows] +
    q · rel_pos_w[shift of columns]` (arXiv 2112.01526, section 4.1). It is not written out as a
    `[L, L]` matrix, which at 1024 × 1024 pixels would be most of the memory: queries are extended
    by their products with all shifts, keys by one-hot rows and columns, and one dot product gives
    the sum.

    Args:
        dim: width.
        num_heads: attention heads.
        window_size: side of a window in tokens; 0 for the whole grid.
        table_grid: height and width in tokens that the tables are for; resized to others.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, table_grid: Sequence[int]
    ) -> None:
        super().__init__(dim, num_heads, window_size)
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads)) for size in table_grid
        )

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention among all tokens of each grid `[N, H, W, C]`; it has its own bias."""
        height, width = grid = x.shape[1:3]
        q, k, v = self.split_heads(x.flatten(1, 2))  # [N, heads, L, c]
        scaled = q * q.shape[-1] ** -0.5
        q = q.unflatten(2, grid)  # [N, heads, H, W, c]
        rows = torch.einsum("nmhwc,hyc->nmhwy", q, shifts_along_axis(self.rel_pos_h, height))
        columns = torch.einsum("nmhwc,wxc->nmhwx", q, shifts_along_axis(self.rel_pos_w, width))
        q = torch.cat([scaled, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)

        row, column = (torch.eye(size, dtype=k.dtype, device=k.device) for size in grid)
        place = torch.cat([row.repeat_interleave(width, 0), column.repeat(height, 1)], dim=-1)
        k = torch.cat([k, place.expand(*k.shape[:2], -1, -1)], dim=-1)  # [N, heads, L, c + H + W]
        # The kernels that keep no [L, L] matrix want a multiple of 8.
        q, k = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.merge_heads(y).view_as(x)


class _DetectionConvViT(ConvViT, Backbone):
    """Common part of the two backbones: no head, stage 3 on its grid, images padded to the stride.

    Args:
        use_act_checkpoint: recompute activations in the backward pass, for less memory.
        **encoder: arguments of `ConvViTEncoder`.
    """

    def __init__(self, *, use_act_checkpoint: bool, **encoder) -> None:
        super().__init__(num_classes=0, **encoder)
        self.prune_intermediate_layers([0, 1, 2], prune_norm=True)
        self.set_grad_checkpointing(use_act_checkpoint)

    def _set_attention(self, index: int, attention: GridAttention) -> None:
        self.blocks3[index].attn = attention.apply(self._initialize)

    def _set_features(self, channels: dict[str, int], strides: dict[str, int]) -> None:
        """Tell Detectron2's `output_shape` what `forward` returns."""
        self._out_features = list(channels)
        self._out_feature_channels = channels
        self._out_feature_strides = strides

    def block_bias(self, grid: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """The bias of the windowed blocks and that of the global ones, if the model has any."""
        return None, None

    def forward_blocks3(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """The blocks of stage 3 on the grid: `[N, L, C]` to the same shape."""
        windowed, everywhere = self.block_bias(grid)
        x = x.unflatten(1, grid)
        for block in self.blocks3:
            x = self._call(block, x, windowed if block.attn.window_size else everywhere)
        return x.flatten(1, 2)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The three stages' maps `[N, C, H / stride, W / stride]` of images `[N, C, H, W]`.

        Sizes that the last feature's stride does not divide are padded with zeros.
        """
        stride = max(self._out_feature_strides.values())
        height, width = (-size % stride for size in x.shape[2:])
        return self.forward_intermediates(F.pad(x, (0, width, 0, height)), intermediates_only=True)


class ConvViTDet(_DetectionConvViT):
    """The backbone of the published Mask R-CNN: four feature maps for an FPN.

    Relative position tables are shared, one by the windowed blocks, one by the global ones; the
    absolute position embedding is sine-cosine and frozen. Both are resized to the input's grid.

    Args:
        img_size: pixels for which the position tables are made; inputs may have any size.
        window_size: side of an attention window in stage-3 tokens.
        global_blocks: the blocks of stage 3 that attend to everything.
        use_act_checkpoint: recompute activations in the backward pass, for less memory.
        **encoder: further arguments of `ConvViTEncoder`.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        window_size: int = 16,
        global_blocks: Sequence[int] = (0, 3, 6, 10),
        use_act_checkpoint: bool = False,
        **encoder,
    ) -> None:
        super().__init__(img_size=img_size, use_act_checkpoint=use_act_checkpoint, **encoder)
        width, grid = self.embed_dim[2], self.geometry.grid(3)
        heads = self.blocks3[0].attn.num_heads
        for i in range(len(self.blocks3)):
            window = 0 if i in global_blocks else window_size
            self._set_attention(i, GridAttention(width, heads, window))
        self.windowed_rel_pos_bias = RelativePositionBias((window_size, window_size), heads)
        self.global_rel_pos_bias = RelativePositionBias(grid, heads)
        self.pos_embed.requires_grad_(False)
        self.pos_embed.data.copy_(torch.from_numpy(get_sincos_pos_embed(width, grid)))
        strides = [self.geometry.stride(stage)[-1] for stage in (1, 2, 3)]
        strides.append(2 * strides[-1])
        names = [f"s{i}" for i in range(4)]
        self._set_features(
            dict(zip(names, (*self.embed_dim, width), strict=True)),
            dict(zip(names, strides, strict=True)),
        )

    def block_bias(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The windows' bias `[heads, side², side²]` and the grid's `[heads, L, L]`."""
        table = self.global_rel_pos_bias.relative_position_bias_table
        autocast = torch.is_autocast_enabled(table.device.type)
        dtype = torch.get_autocast_dtype(table.device.type) if autocast else table.dtype
        # Cast here, once: each block's attention would cast, and keep, a copy of its own.
        return self.windowed_rel_pos_bias().to(dtype), self.global_rel_pos_bias(grid).to(dtype)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `[N, in_chans, H, W]` to maps at 1/4, 1/8, 1/16 and 1/32, `s0` … `s3`."""
        maps = self.forward_maps(x)
        maps.append(F.max_pool2d(maps[-1], 2))
        return dict(zip(self._out_features, maps, strict=True))


class SingleScaleConvViTDet(_DetectionConvViT):
    """The ViTDet-style backbone: one feature map, for the simple feature pyramid.

    Relative positions are decomposed, each block with its own tables; the absolute position
    embedding keeps its pretraining size. Both are resized to the input's grid as ViTDet does.

    Args:
        img_size: pixels for which the global blocks' tables are made; inputs may have any size.
        pretrain_img_size: pixels for which the absolute position embedding is made.
        window_size: side of an attention window in stage-3 tokens.
        global_blocks: the blocks of stage 3 that attend to everything.
        use_act_checkpoint: recompute activations in the backward pass, for less memory.
        **encoder: further arguments of `ConvViTEncoder`.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        pretrain_img_size: int | Sequence[int] = 224,
        window_size: int = 14,
        global_blocks: Sequence[int] = (1, 4, 7, 10),
        use_act_checkpoint: bool = False,
        **encoder,
    ) -> None:
        super().__init__(
            img_size=pretrain_img_size, use_act_checkpoint=use_act_checkpoint, **encoder
        )
        width, heads = self.embed_dim[2], self.blocks3[0].attn.num_heads
        sizes = (img_size, img_size) if isinstance(img_size, int) else img_size
        stride = self.geometry.stride(3)
        grid = [-(-size // s) for size, s in zip(sizes, stride, strict=True)]
        for i in range(len(self.blocks3)):
            window = 0 if i in global_blocks else window_size
            tables = (window, window) if window else grid
            self._set_attention(i, DecomposedAttention(width, heads, window, tables))
        for conv_block in (*self.blocks1, *self.blocks2):  # else 1e-5, as in the first backbone
            conv_block.norm1.eps = conv_block.norm2.eps = 1e-6
        self._set_features({"last_feat": width}, {"last_feat": stride[-1]})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `[N, in_chans, H, W]` to the stage-3 map at 1/16, `last_feat`."""
        return {"last_feat": self.forward_maps(x)[-1]}
