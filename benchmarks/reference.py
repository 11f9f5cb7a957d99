"""Reference models: the published (dense) forms, oracle of the tests, and a plain MAE."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from models_convmae import MaskedAutoencoderConvViT, gather_tokens
from models_convvit import LAYER_NORM, ConvBlock, ConvViT, PatchEmbed
from util.layers.geometry import CONV, Geometry
from util.layers.pos_embed import get_sincos_pos_embed


def conv_on_grid(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of the encoder as torch computes it: grid `[N, C, *size]` to grid."""
    return CONV[x.ndim - 2].forward(conv, x)


def norm_on_grid(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of a grid `[N, C, *size]`."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def patch_embed_on_grid(embed: PatchEmbed, x: Tensor) -> Tensor:
    """`PatchEmbed` of a grid: `[N, C_in, *size]` to `[N, C, *size / patch]`."""
    return embed.act(norm_on_grid(embed.norm, conv_on_grid(embed.proj, x)))


def conv_block_on_grid(block: ConvBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`ConvBlock` as the original computes it, with block-wise masking (paper section 3.2).

    Args:
        block: to apply.
        x: `[N, C, *size]`.
        mask: `[N, 1, *size]`, 1 where removed, 0 where visible; None for no masking.

    Returns:
        `[N, C, *size]`. Removed positions hold numbers that no visible one depends on.
    """
    y = conv_on_grid(block.conv1, norm_on_grid(block.norm1, x))
    if mask is not None:
        y = y * (1 - mask).to(y.dtype)
    y = conv_on_grid(block.conv2, conv_on_grid(block.attn, y))
    x = x + block.drop_path(y)
    y = F.gelu(conv_on_grid(block.mlp.fc1, norm_on_grid(block.norm2, x)))
    return x + block.drop_path(conv_on_grid(block.mlp.fc2, y))


class DenseMaskedAutoencoder(MaskedAutoencoderConvViT):
    """ConvMAE as the original computes it: everything, with the mask applied in each ConvBlock."""

    def convolution_masks(self, mask: Tensor) -> dict[int, Tensor | None]:
        """For stages 1 and 2 what their convolutions must not see, `[N, 1, *grid]` of 0 and 1.

        Args:
            mask: `[N, L]`, 1 where a block is removed.
        """
        blocks = mask.view(len(mask), 1, *self.geometry.grid(3))
        return {
            stage: F.interpolate(blocks, self.geometry.grid(stage), mode="nearest-exact")
            for stage in (1, 2)
        }

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The dense form of `MaskedAutoencoderConvViT.forward_encoder`, with the same results."""
        ids_keep, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        x, masks = torch.cat([imgs] * (len(mask) // len(imgs))), self.convolution_masks(mask)
        x = stage1 = patch_embed_on_grid(self.patch_embed1, x)
        for block in self.blocks1:
            x = stage1 = conv_block_on_grid(block, x, masks[1])
        x = stage2 = patch_embed_on_grid(self.patch_embed2, x)
        for block in self.blocks2:
            x = stage2 = conv_block_on_grid(block, x, masks[2])
        x = patch_embed_on_grid(self.patch_embed3, x).flatten(2).transpose(1, 2)  # [N, L, C]
        prefix = self.num_prefix_tokens
        x = gather_tokens(self.patch_embed4(x) + self.pos_embed[:, prefix:], ids_keep)
        if prefix:
            token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks3:
            x = block(x)
        if self.multi_scale:
            for decode, grid in (
                (self.stage1_output_decode, stage1),
                (self.stage2_output_decode, stage2),
            ):
                fused = conv_on_grid(decode, grid).flatten(2).transpose(1, 2)
                x = x + F.pad(gather_tokens(fused, ids_keep), (0, 0, prefix, 0))
        return self.norm(x), mask, ids_restore


class GridConvViT(ConvViT):
    """The classifier as the original computes it: grids with channels first, convolutions only."""

    def forward_stages(self, x: Tensor, stages: int = 3) -> list[Tensor]:
        """All three stages of `ConvViT.forward_stages`; the first two as grids `[N, C, *grid]`."""
        outputs = []
        for patch_embed, blocks in (
            (self.patch_embed1, self.blocks1),
            (self.patch_embed2, self.blocks2),
        ):
            x = patch_embed_on_grid(patch_embed, x)
            for block in blocks:
                x = conv_block_on_grid(block, x)
            outputs.append(x)
        x = patch_embed_on_grid(self.patch_embed3, x).flatten(2).transpose(1, 2)  # [N, L, C]
        x = self.patch_embed4(x) + self.pos_embed
        for block in self.blocks3:
            x = block(x)
        return [*outputs, x]


class PlainMaskedAutoencoder(nn.Module):
    """MAE of a plain ViT (arXiv 2111.06377), of timm's blocks; by default ViT-B/16.

    Masking, target and loss are this project's, which are MAE's.

    Args:
        img_size: input size in pixels, an int for a square image or one entry a dimension.
        patch_size: sides of a patch in pixels, an int or one entry a dimension.
        in_chans: channels of the input.
        mask_unit: patches along each dimension that stay or go together.
        class_token: with a token beside those of the patches, as MAE has it and VideoMAE has not.
        embed_dim, depth, num_heads: the encoder's.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder's.
        norm_pix_loss: compare with patches normalised by their own mean and variance.

    Raises:
        ValueError: a size that the patch does not divide, or a width too small for it.
    """

    patchify = MaskedAutoencoderConvViT.patchify
    random_masking = MaskedAutoencoderConvViT.random_masking
    forward_loss = MaskedAutoencoderConvViT.forward_loss
    target = MaskedAutoencoderConvViT.target
    complementary = False

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        mask_unit: Sequence[int] | None = None,
        class_token: bool = True,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = geometry = Geometry.of(img_size, (patch_size, 1, 1), mask_unit)
        self.norm_pix_loss = norm_pix_loss

        def blocks(dim: int, heads: int, number: int) -> nn.Sequential:
            kwargs = dict(qkv_bias=True, norm_layer=LAYER_NORM)
            return nn.Sequential(*(Block(dim, heads, **kwargs) for _ in range(number)))

        patch = geometry.stride(3)
        self.patch_embed = CONV[geometry.ndim](in_chans, embed_dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, int(class_token), embed_dim))
        self.blocks = blocks(embed_dim, num_heads, depth)
        self.norm = LAYER_NORM(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_num_heads, decoder_depth)
        self.decoder_norm = LAYER_NORM(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.geometry.patch_pixels * in_chans)

        # MAE's table has a row of zeros for the class token; here it is just not added to it.
        for name, dim in (("pos_embed", embed_dim), ("decoder_pos_embed", decoder_embed_dim)):
            table = torch.from_numpy(get_sincos_pos_embed(dim, self.geometry.grid(3))).float()
            self.register_buffer(name, table.unsqueeze(0))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """MAE's: xavier linear maps and patch embedding, zero biases, normal(0, 0.02) tokens."""
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        predict_share: float = 1.0,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pretraining forward pass, called like `MaskedAutoencoderConvViT.forward`.

        Args:
            imgs: `[N, C, *img_size]`.
            mask_ratio: share of patches to remove.
            noise: `[N, U]`, what decides the mask; drawn if not given.
            predict_share: 1; every patch is predicted.
            features: None; there is no teacher.

        Returns:
            loss: a scalar.
            pred: `[N, L, patch_pixels * C]`, a prediction for every patch.
            mask: `[N, L]`, 1 where removed.

        Raises:
            ValueError: another share, or features.
        """
        if predict_share != 1 or features is not None:
            raise ValueError("the plain MAE predicts every patch and has no teacher")
        ids_keep, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        patches = self.patch_embed(imgs).flatten(2).transpose(1, 2)  # [N, L, C]
        x = gather_tokens(patches + self.pos_embed, ids_keep)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))

        prefix = self.cls_token.shape[1]
        cls_token, x = x[:, :prefix], x[:, prefix:]
        removed = ids_restore.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.expand(len(x), removed, -1)], dim=1)
        x = gather_tokens(x, ids_restore) + self.decoder_pos_embed
        x = torch.cat([cls_token, x], dim=1)
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, prefix:]
        return self.forward_loss(imgs, pred, mask), pred, mask
