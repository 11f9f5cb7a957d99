"""ConvMAE: a masked autoencoder with a ConvViT encoder (arXiv 2205.03892, section 3)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models_convvit import LAYER_NORM, Block, ConvViTEncoder
from util.errors import UsageError
from util.layers.architecture import SIZES
from util.layers.convolution import strided_conv
from util.layers.geometry import Geometry, to_nested_blocks
from util.layers.pos_embed import get_sincos_pos_embed
from util.weights.load import load_weights
from util.weights.read import KINDS, read_weights


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens `ids` `[N, M]` of `[N, L, C]`, as `[N, M, C]`."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def normalize_valid(patches: Tensor, valid: Tensor) -> Tensor:
    """Patches `[N, B, P]` normalised by mean and variance of their valid values (1, else 0)."""
    count = valid.sum(dim=-1, keepdim=True)
    whole = count == patches.shape[-1]  # exactly as without `valid`
    mean = (patches * valid).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    mean = torch.where(whole, patches.mean(dim=-1, keepdim=True), mean)
    var = ((patches - mean) ** 2 * valid).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    var = torch.where(whole, patches.var(dim=-1, keepdim=True), var)
    return (patches - mean) / (var + 1e-6) ** 0.5


class MaskedAutoencoderConvViT(ConvViTEncoder):
    """Masked autoencoder: encodes the visible blocks only and predicts the removed pixels.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, kernel_size,
            temporal_kernel, norm_layer: the encoder's, see `ConvViTEncoder`.
        mask_unit: stage-3 tokens along each dimension that stay or go together, see `Geometry`.
        multi_scale: fuse stages 1 and 2 into what the decoder sees (paper section 3.2).
        decoder_embed_dim: width of the decoder.
        decoder_depth: transformer blocks of the decoder.
        decoder_num_heads: attention heads of the decoder; its MLP ratio is the first stage's.
        norm_pix_loss: compare with patches normalised by their own mean and variance.

    Raises:
        ValueError: a size, stride or width that does not divide.
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
        kernel_size: int = 5,
        temporal_kernel: int = 3,
        mask_unit: Sequence[int] | None = None,
        multi_scale: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            temporal_kernel=temporal_kernel,
            norm_layer=norm_layer,
        )
        self.geometry = geometry = Geometry.of(img_size, patch_size, mask_unit)
        self.multi_scale = multi_scale
        self.norm_pix_loss = norm_pix_loss

        if multi_scale:
            strides = [
                tuple(map(math.prod, zip(*geometry.patch_size[stage:], strict=True)))
                for stage in (1, 2)
            ]
            # The kernels cover a block: their positions are nested as its tokens are.
            units = (geometry.nesting(1)[1:], geometry.nesting(2)[1:])
            self.stage1_output_decode, self.stage2_output_decode = (
                strided_conv(dim, embed_dim[2], stride, nesting)
                for dim, stride, nesting in zip(embed_dim[:2], strides, units, strict=True)
            )
        self.norm = norm_layer(embed_dim[2])

        self.decoder_embed = nn.Linear(embed_dim[2], decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, geometry.num_patches, decoder_embed_dim), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio[0], norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, geometry.patch_pixels * in_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the published code: fixed sin-cos tables, xavier linear maps, MAE's mask token."""
        grid = self.geometry.grid(3)
        self.pos_embed.requires_grad_(False)
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_sincos_pos_embed(table.shape[-1], grid)
            table.data.copy_(torch.from_numpy(values).unsqueeze(0))
        kernel = self.patch_embed3.proj.weight.data
        nn.init.xavier_uniform_(kernel.view(len(kernel), -1))
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Images `[N, C, *img_size]` to patches `[N, L, patch_pixels * C]`.

        A patch's values are in the order (frame, row, column, channel), a picture's without frames.
        """
        patches = to_nested_blocks(imgs, [self.geometry.stride(3)])  # [N, *grid, *patch, C]
        return patches.reshape(len(imgs), self.geometry.num_patches, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches `[N, L, patch_pixels * C]` to images `[N, C, *img_size]`, undoing `patchify`."""
        geometry, ndim = self.geometry, self.geometry.ndim
        x = x.reshape(len(x), *geometry.grid(3), *geometry.stride(3), self.in_chans)
        # [N, *grid, *patch, C] -> [N, C, grid_1, patch_1, grid_2, patch_2, …]
        order = [axis for d in range(ndim) for axis in (1 + d, 1 + ndim + d)]
        return x.permute(0, -1, *order).reshape(len(x), self.in_chans, *geometry.img_size)

    def random_masking(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose for each image the blocks to keep, uniformly at random (paper section 3.2).

        Blocks of one mask unit share their fate; in images each of the `L` blocks is a unit.

        Args:
            imgs: `[N, …]`; only the number and the device matter.
            mask_ratio: share of the `U` mask units to remove.
            noise: `[N, U]`, the units with the smallest values stay; drawn if not given.

        Returns:
            ids_keep: `[N, visible]`, the blocks of the `int(U * (1 - mask_ratio))` visible units.
            mask: `[N, L]`, float, 0 keep, 1 removed.
            ids_restore: `[N, L]`, the place of each block in the shuffled order.

        Raises:
            ValueError: a ratio that removes nothing or everything, noise of another shape.
        """
        geometry, shape = self.geometry, (len(imgs), self.geometry.num_mask_units)
        keep = geometry.visible_patches(mask_ratio)
        if noise is not None and noise.shape != shape:
            unit = "patch" if geometry.num_mask_units == geometry.num_patches else "mask unit"
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} must be one number a {unit}, {shape}"
            )
        if noise is None:
            noise = torch.rand(shape, device=imgs.device)
        blocks = torch.arange(geometry.num_patches, device=imgs.device).view(
            1, 1, *geometry.grid(3)
        )
        units = to_nested_blocks(blocks, [geometry.mask_unit]).reshape(shape[1], -1)
        ids_shuffle = units[torch.argsort(noise, dim=1)].flatten(1)  # [N, U, blocks] -> [N, L]
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = (ids_restore >= keep).float()
        return ids_shuffle[:, :keep], mask, ids_restore

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode what is visible, fuse the stages (paper section 3.2).

        Args:
            imgs: `[N, C, *img_size]`.
            mask_ratio: share of blocks to remove.
            noise: `[N, U]`, the mask units with the smallest values stay; drawn if not given.

        Returns:
            latent: `[N, visible, embed_dim[2]]`.
            mask: `[N, L]`, float, 0 keep, 1 removed.
            ids_restore: `[N, L]`, the place of each block in the shuffled order.
        """
        ids_keep, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        stage1, stage2, x = self.forward_visible(imgs, ids_keep)
        if self.multi_scale:
            x = x + self.stage1_output_decode(stage1) + self.stage2_output_decode(stage2)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch: latent `[N, visible, C]` to `[N, L, patch_pixels * C]`."""
        x = self.decoder_embed(latent)
        removed = ids_restore.shape[1] - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), removed, -1)
        x = gather_tokens(torch.cat([x, mask_tokens], dim=1), ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(
        self, imgs: Tensor, pred: Tensor, mask: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Mean squared error over the removed patches, in float32.

        Args:
            imgs: `[N, C, *img_size]`.
            pred: `[N, L, patch_pixels * C]`.
            mask: `[N, L]`, 1 where removed.
            valid: `[N, C, *img_size]`, bool: the values that count; all by default.

        Returns:
            A scalar, 0 where nothing counts.
        """
        with torch.autocast(imgs.device.type, enabled=False):
            patches = self.patchify(imgs.float())
            if valid is None:
                return (self.patch_loss(patches, pred) * mask).sum() / mask.sum()
            valid = self.patchify(valid.float())
            loss = self.patch_loss(patches, pred, valid)
            # A patch weighs as much as it has values: with all of them, exactly as above.
            total = (mask * valid.mean(dim=-1)).sum()
            return (loss * mask).sum() / torch.where(total > 0, total, 1.0)

    def patch_loss(self, patches: Tensor, pred: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mean squared error of each patch: `[N, B, patch_pixels * C]` to `[N, B]`.

        With `valid`, of the patches' shape, 1 for the values that count and 0 for the others, the
        errors of these are 0.
        """
        if valid is not None:
            if self.norm_pix_loss:
                patches = normalize_valid(patches, valid)
            return (F.mse_loss(pred.float(), patches, reduction="none") * valid).mean(dim=-1)
        if self.norm_pix_loss:
            mean = patches.mean(dim=-1, keepdim=True)
            var = patches.var(dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6) ** 0.5
        return F.mse_loss(pred.float(), patches, reduction="none").mean(dim=-1)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pretraining forward pass.

        Args:
            imgs: `[N, C, *img_size]`.
            mask_ratio: share of patches to remove.
            noise: `[N, U]`, what decides the mask, see `random_masking`. If not given it is drawn
                before anything else, so that a seed gives the published code's mask.
            valid: `[N, C, *img_size]`, bool: the values that take part in the loss.

        Returns:
            loss: a scalar.
            pred: `[N, L, patch_pixels * C]`, a prediction for every patch.
            mask: `[N, L]`, 1 where removed.

        Raises:
            ValueError: images of another shape, or a ratio that leaves nothing.
        """
        self.check_input(imgs)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask, valid), pred, mask


def convmae_convvit_tiny_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """Ours, for the demo, the tests and a first look on a CPU. `kwargs` override any argument."""
    decoder = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
    return MaskedAutoencoderConvViT(**{**SIZES["tiny"], **decoder, **kwargs})


def convmae_convvit_small_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """ConvMAE-S. `kwargs` override any argument of `MaskedAutoencoderConvViT`."""
    return MaskedAutoencoderConvViT(**{**SIZES["small"], **kwargs})


def convmae_convvit_base_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """ConvMAE-B, the paper's main model. `kwargs` override any argument."""
    return MaskedAutoencoderConvViT(**{**SIZES["base"], **kwargs})


def convmae_convvit_large_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """ConvMAE-L. `kwargs` override any argument of `MaskedAutoencoderConvViT`."""
    return MaskedAutoencoderConvViT(**{**SIZES["large"], **kwargs})


def convmae_convvit_huge_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """ConvMAE-H. `kwargs` override any argument of `MaskedAutoencoderConvViT`."""
    return MaskedAutoencoderConvViT(**{**SIZES["huge"], **kwargs})


# The original repository's name for the base model.
convmae_convvit_base_patch16_dec512d8b = convmae_convvit_base_patch16

# Model name to factory, for command lines and checkpoints.
MODELS = {
    "convmae_convvit_tiny_patch16": convmae_convvit_tiny_patch16,
    "convmae_convvit_small_patch16": convmae_convvit_small_patch16,
    "convmae_convvit_base_patch16": convmae_convvit_base_patch16,
    "convmae_convvit_base_patch16_dec512d8b": convmae_convvit_base_patch16_dec512d8b,
    "convmae_convvit_large_patch16": convmae_convvit_large_patch16,
    "convmae_convvit_huge_patch16": convmae_convvit_huge_patch16,
}


def convmae_from_checkpoint(
    path: str | Path, models: Mapping[str, Callable[..., MaskedAutoencoderConvViT]] = MODELS
) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining checkpoint, with its weights.

    Args:
        path: a file of this framework or of the original code; its arguments name the model.
        models: the names that are known.

    Raises:
        UsageError: a file that cannot be read, an unknown model, or weights that are not a whole
            autoencoder.
    """
    weights = read_weights(path)
    name, args = weights.args.get("model"), weights.args
    if weights.kind != "autoencoder":
        raise UsageError(
            f"checkpoint {path} is {KINDS[weights.kind]}: only a whole autoencoder can reconstruct"
        )
    if name not in models:
        raise UsageError(
            f"checkpoint {path}: it is no pretraining checkpoint: its model is {name!r}, not one "
            f"of {', '.join(models)}"
        )
    known = {k: args[k] for k in ("norm_pix_loss", "masking") if args.get(k) is not None}
    try:
        model = models[name](**weights.architecture.encoder_kwargs(), **known)
    except ValueError as error:
        raise UsageError(f"checkpoint {path}: {error}") from error
    more = load_weights(model, weights).unexpected
    if more:
        raise UsageError(
            f"checkpoint {path} holds {len(more)} weights that a {name} does not have: {more[0]}, …"
        )
    return model
