"""What `pretrain_step.py` compares with, and the tests' oracle: dense ConvMAE and a plain MAE."""

import torch.nn.functional as F
from torch import Tensor

from models_convmae import MaskedAutoencoderConvViT


class DenseMaskedAutoencoder(MaskedAutoencoderConvViT):
    """ConvMAE as the original computes it: everything, with the mask applied in each ConvBlock."""

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The dense form of `MaskedAutoencoderConvViT.forward_encoder`, with the same results."""
        ids_keep, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        block_mask = mask.view(len(imgs), 1, *self.geometry.grid(3))  # [N, 1, *grid]

        x, masks = imgs, {}
        for stage in (1, 2):
            masks[stage] = F.interpolate(block_mask, size=self.geometry.grid(stage))
        x = self.patch_embed1(x)
        for block in self.blocks1:
            x = block(x, masks[1])
        stage1 = self.stage1_output_decode(x).flatten(2).transpose(1, 2)
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = block(x, masks[2])
        stage2 = self.stage2_output_decode(x).flatten(2).transpose(1, 2)
        x = self.patch_embed4(self.patch_embed3(x).flatten(2).transpose(1, 2)) + self.pos_embed

        def visible(tokens: Tensor) -> Tensor:
            return tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

        x = visible(x)
        for block in self.blocks3:
            x = block(x)
        return self.norm(x + visible(stage1) + visible(stage2)), mask, ids_restore
