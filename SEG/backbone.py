"""The ConvMAE encoder as a backbone of MMSegmentation (the paper's semantic segmentation)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor, nn

from models_convvit import LAYER_NORM, Attention, Block, ConvViT
from util.layers.geometry import Geometry
from util.layers.recompute import apply_recomputed
from util.layers.rel_pos import RelativePositions
from util.weights.load import Report, load_weights
from util.weights.read import read_weights

# What a checkpoint of pretraining or classification does not have.
NEW = ("fpn", "blocks3.*.gamma_[12]", "blocks3.*.attn.relative_position_bias_table")


class RelativeAttention(RelativePositions, Attention):
    """Attention with a relative position bias of its own.

    Args:
        dim: width.
        num_heads: attention heads.
        grid: height and width in tokens that the bias is learnt for.
    """

    def __init__(self, dim: int, num_heads: int, grid: Sequence[int]) -> None:
        super().__init__(dim, num_heads)
        self.make_relative_positions(grid, num_heads)


class RelativeBlock(Block):
    """Transformer block with a relative position bias and layer scale.

    Args:
        dim, num_heads, mlp_ratio, drop_path, norm_layer: as `Block` takes them.
        grid: height and width in tokens that the bias is learnt for.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        *,
        grid: Sequence[int],
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, drop_path, norm_layer)
        self.attn = RelativeAttention(dim, num_heads, grid)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens `[N, L, C]` of a grid `(h, w)` to the same shape."""
        bias = self.attn.relative_position_bias(grid)
        x = x + self.drop_path(self.gamma_1 * apply_recomputed(self.norm1, self.attn, x, bias))
        return x + self.drop_path(self.gamma_2 * apply_recomputed(self.norm2, self.mlp, x))


@MODELS.register_module()
class ConvMAE(ConvViT):
    """ConvViT as a multi-scale backbone: features at 1/4, 1/8, 1/16 and 1/32.

    The first three are the stages' outputs; the last comes from a 3x3 convolution of stride 2
    without padding.
    Position tables are resized to the grid of any input.

    Args:
        img_size: height and width that the position tables are made for: the training crop.
        pretrained: checkpoint to begin from, of pretraining, classification or segmentation, in
            any format that `util.weights` reads; `init_weights` loads it.
        norm_cfg: norm after the last convolution, as mmcv's `build_norm_layer` takes it.
        with_cp: recompute activations in the backward pass: less memory, more time.
        **encoder: the rest of the arguments of `ConvViTEncoder`; the defaults are the base model.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 512,
        patch_size: Sequence[int | Sequence[int]] = (4, 2, 2),
        pretrained: str | None = None,
        norm_cfg: dict | None = None,
        with_cp: bool = False,
        **encoder,
    ) -> None:
        block = partial(RelativeBlock, grid=Geometry.of(img_size, patch_size).grid(3))
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=0,
            block=block,
            norm_layer=nn.LayerNorm,  # eps 1e-5: segmentation's own
            **encoder,
        )
        self.prune_intermediate_layers(3, prune_norm=True)  # the head and its norm
        width = self.embed_dim[2]
        self.fpn = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2),  # no padding, as the original
            build_norm_layer(norm_cfg or dict(type="SyncBN"), width)[1],
            nn.GELU(),
        )
        self.pretrained = pretrained
        self.set_grad_checkpointing(with_cp)

    def init_weights(self) -> None:
        """Load `pretrained`, if there is one; mmengine calls this before training."""
        if self.pretrained:
            print_log(str(self.load(self.pretrained)), logger="current")

    def load(self, path: str) -> Report:
        """Load the encoder of a checkpoint of any kind.

        `SEG.train` normalises the images as the run did that the checkpoint comes from; another
        program sets `data_preprocessor` itself, if that was not by ImageNet's numbers.

        Returns:
            What was loaded, resized and left out.

        Raises:
            UsageError: a file that is no checkpoint of this architecture, with the reason.
        """
        weights = read_weights(path)
        return load_weights(self, weights.without_heads(), new=NEW, prefix=weights.encoder)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside the 1-d ones: position tables."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("_bias_table")}
        return super().no_weight_decay() | tables

    def forward_blocks3(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """The transformer blocks: tokens `[N, L, C]` of a grid to the same shape."""
        for block in self.blocks3:
            x = self._call(block, x, tuple(grid))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Feature maps of an image of any size.

        A size that the strides do not divide is padded with zeros, and the maps are cropped to
        what covers the image.

        Args:
            x: `[N, in_chans, H, W]`.

        Returns:
            `[N, C_i, ceil(H / s_i), ceil(W / s_i)]` for the strides 4, 8 and 16 (of the default
            `patch_size`), and the last, `(h - 1) // 2` of the third's sides `h`, at least 1.
        """
        size, strides = x.shape[2:], [self.geometry.stride(stage) for stage in (1, 2, 3)]
        rows, columns = (-s % p for s, p in zip(size, strides[2], strict=True))
        maps = self.forward_intermediates(F.pad(x, (0, columns, 0, rows)), intermediates_only=True)
        covered = [[-(-s // p) for s, p in zip(size, stride, strict=True)] for stride in strides]
        maps = [m[..., :h, :w] for m, (h, w) in zip(maps, covered, strict=True)]
        # A third map of fewer than 3 tokens gets zeros for the kernel to fit.
        rows, columns = (max(0, 3 - side) for side in maps[2].shape[2:])
        return *maps, self.fpn(F.pad(maps[2], (0, columns, 0, rows)))
