"""ConvMAE: a masked autoencoder with a ConvViT encoder (arXiv 2205.03892, section 3)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
from util.weights.read import KINDS, Weights, read_weights


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens `ids` `[N, M]` of `[N, L, C]`, as `[N, M, C]`."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def running_cells(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Cells of 2x2 patches that run on in time: the place of each patch in its cell, `[L]`.

    The places are 0 to 3 in rows, and move on by one with each step in time, so that patches of
    one place cover a clip evenly (VideoMAE V2, arXiv 2303.16727, section 3.2).

    Args:
        grid: patches of a clip in time, rows and columns.
        device: of the result.
    """
    sides = [torch.arange(length, device=device) for length in grid]
    time, row, column = torch.meshgrid(*sides, indexing="ij")
    return ((2 * (row % 2) + column % 2 + time) % 4).flatten()


def patch_moments(patches: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of patches `[N, B, P]`, of the `valid` values (1, else 0): `[N, B, 1]`."""
    if valid is None:
        return patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    count = valid.sum(dim=-1, keepdim=True)
    whole = count == patches.shape[-1]  # exactly as without `valid`
    mean = (patches * valid).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    mean = torch.where(whole, patches.mean(dim=-1, keepdim=True), mean)
    var = ((patches - mean) ** 2 * valid).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, torch.where(whole, patches.var(dim=-1, keepdim=True), var)


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
        complementary: mask each image as often as there are disjoint visible sets of its blocks,
            see `random_masking` (FastConvMAE).
        class_token: a learnable token before those of the grid, in stage 3 and the decoder; the v2
            checkpoints have it.
        mimic_dim: width of a teacher's tokens that visible tokens resemble, after a linear map
            (MR-MCMAE, arXiv 2303.05475); 0 for none.
        mimic_weight: of that part of the loss.

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
        complementary: bool = False,
        class_token: bool = False,
        mimic_dim: int = 0,
        mimic_weight: float = 1.0,
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
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim {decoder_embed_dim} is not divisible by decoder_num_heads "
                f"{decoder_num_heads}"
            )
        self.geometry = geometry = Geometry.of(img_size, patch_size, mask_unit)
        self.decoder_num_heads = decoder_num_heads
        self.multi_scale = multi_scale
        self.norm_pix_loss = norm_pix_loss
        self.complementary = complementary
        self.mimic_weight = mimic_weight
        if class_token:
            self.add_class_token()

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
            torch.zeros(1, int(class_token) + geometry.num_patches, decoder_embed_dim),
            requires_grad=False,
        )
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio[0], norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, geometry.patch_pixels * in_chans)
        if mimic_dim:
            self.mimic = nn.Linear(embed_dim[2], mimic_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the published code: fixed sin-cos tables, xavier linear maps, MAE's tokens."""
        grid = self.geometry.grid(3)
        self.pos_embed.requires_grad_(False)
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_sincos_pos_embed(table.shape[-1], grid)
            table.data[0, self.num_prefix_tokens :] = torch.from_numpy(values)
        kernel = self.patch_embed3.proj.weight.data
        nn.init.xavier_uniform_(kernel.view(len(kernel), -1))
        nn.init.normal_(self.mask_token, std=0.02)
        if self.num_prefix_tokens:
            nn.init.normal_(self.cls_token, std=0.02)
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

        A `complementary` model cuts the shuffled blocks into `K` visible sets that share no block,
        each of them what one mask leaves: `K = U // visible units`, otherwise 1. Blocks left over
        are removed in every mask. Rows are mask-major: the first masks of all images, then the
        second ones, and so on.

        Args:
            imgs: `[N, …]`; only the number and the device matter.
            mask_ratio: share of the `U` mask units to remove.
            noise: `[N, U]`, the units with the smallest values stay; drawn if not given.

        Returns:
            ids_keep: `[K * N, visible]`, the blocks of the `int(U * (1 - mask_ratio))` visible
                units.
            mask: `[K * N, L]`, float, 0 keep, 1 removed.
            ids_restore: `[K * N, L]`, the place of each block in the shuffled order, which begins
                with the visible ones.

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
        ids_keep = ids_shuffle[:, :keep]
        if self.complementary:
            masks, length = geometry.num_masks(mask_ratio), geometry.num_patches
            ids_keep = torch.cat(ids_shuffle[:, : masks * keep].split(keep, dim=1))
            ids_restore = torch.cat([(ids_restore - k * keep) % length for k in range(masks)])
        mask = (ids_restore >= keep).float()
        return ids_keep, mask, ids_restore

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode what is visible, fuse the stages (paper section 3.2).

        Args:
            imgs: `[N, C, *img_size]`.
            mask_ratio: share of blocks to remove.
            noise: `[N, U]`, the mask units with the smallest values stay; drawn if not given.

        Returns:
            latent: `[K * N, prefix + visible, embed_dim[2]]`.
            mask: `[K * N, L]`, float, 0 keep, 1 removed.
            ids_restore: `[K * N, L]`, the place of each block in the shuffled order.
        """
        ids_keep, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        stage1, stage2, x = self.forward_visible(imgs, ids_keep)
        if self.multi_scale:
            prefix, x = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            x = x + self.stage1_output_decode(stage1) + self.stage2_output_decode(stage2)
            x = torch.cat([prefix, x], dim=1) if self.num_prefix_tokens else x
        return self.norm(x), mask, ids_restore

    def choose_predicted(self, ids_restore: Tensor, visible: int, predicted: int) -> Tensor:
        """Choose which removed patches to predict: of pictures any, of clips `running_cells`.

        The choice follows from the mask's random order; nothing more is drawn. Of a clip's removed
        patches come those of one place in the cells first, then those of the next place and so
        on, the first place being that of its first removed patch.

        Args:
            ids_restore: `[N, L]`, see `random_masking`.
            visible: how many patches are.
            predicted: how many to choose.

        Returns:
            `[N, predicted]`, patches of the grid.
        """
        ids_removed = torch.argsort(ids_restore, dim=1)[:, visible:]
        if self.geometry.ndim == 3:
            places = running_cells(self.geometry.grid(3), ids_restore.device)[ids_removed]
            turn = (places - places[:, :1]) % 4
            ids_removed = ids_removed.gather(1, torch.argsort(turn, dim=1, stable=True))
        return ids_removed[:, :predicted]

    def forward_decoder(
        self, latent: Tensor, ids_restore: Tensor, ids_predict: Tensor | None = None
    ) -> Tensor:
        """Predict patches from the visible ones (paper section 3.2).

        Args:
            latent: `[N, prefix + visible, C]`.
            ids_restore: `[N, L]`, see `random_masking`.
            ids_predict: `[N, B]`, the only ones of the removed patches that the decoder computes.

        Returns:
            `[N, L, patch_pixels * C]`, every patch, or `[N, B, patch_pixels * C]`, `ids_predict`.
        """
        skip, pos_embed = self.num_prefix_tokens, self.decoder_pos_embed
        x = self.decoder_embed(latent)
        prefix, x = x[:, :skip] + pos_embed[:, :skip], x[:, skip:]
        pos_embed = pos_embed[:, skip:]
        length, visible = ids_restore.shape[1], x.shape[1]
        removed = length - visible if ids_predict is None else ids_predict.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), removed, -1)
        x = torch.cat([x, mask_tokens], dim=1)
        if ids_predict is None:
            x = gather_tokens(x, ids_restore) + pos_embed
        else:
            ids_keep = torch.argsort(ids_restore, dim=1)[:, :visible]
            x = x + pos_embed[0, torch.cat([ids_keep, ids_predict], dim=1)]
            skip += visible
        x = torch.cat([prefix, x], dim=1) if self.num_prefix_tokens else x
        for block in self.decoder_blocks:
            x = self._call(block, x)
        return self.decoder_pred(self.decoder_norm(x[:, skip:]))

    def forward_loss(
        self,
        imgs: Tensor,
        pred: Tensor,
        mask: Tensor,
        ids_predict: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error over the removed patches, in float32.

        Args:
            imgs: `[N, C, *img_size]`.
            pred: `[K * N, L, patch_pixels * C]`; with `ids_predict`, of these patches alone.
            mask: `[K * N, L]`, 1 where removed.
            ids_predict: `[K * N, B]`, see `forward_decoder`.
            valid: `[N, C, *img_size]`, bool: the values that count; all by default.

        Returns:
            A scalar, 0 where nothing counts.
        """
        with torch.autocast(imgs.device.type, enabled=False):
            pred = pred.float().unflatten(0, (-1, len(imgs)))  # [K, N, L or B, patch_pixels * C]
            if ids_predict is not None:
                mask = mask.gather(1, ids_predict)
                ids_predict = ids_predict.unflatten(0, (-1, len(imgs)))

            def predicted(patches: Tensor) -> Tensor:  # [N, L, …] as `pred`
                patches = patches.expand(len(pred), -1, -1, -1)
                if ids_predict is None:
                    return patches
                return patches.gather(2, ids_predict.unsqueeze(-1).expand_as(pred))

            if valid is not None:
                valid = self.patchify(valid.float())
            target = predicted(self.target(imgs.float(), valid))
            loss = F.mse_loss(pred, target, reduction="none")
            if valid is None:
                return (loss.mean(dim=-1).flatten(0, 1) * mask).sum() / mask.sum()
            # A patch weighs as much as it has values: with all of them, exactly as above.
            valid = predicted(valid)
            total = (mask * valid.mean(dim=-1).flatten(0, 1)).sum()
            loss = (loss * valid).mean(dim=-1).flatten(0, 1)
            return (loss * mask).sum() / torch.where(total > 0, total, 1.0)

    def mimic_loss(self, latent: Tensor, ids_restore: Tensor, features: Tensor) -> Tensor:
        """Mean squared error to a teacher's tokens at the visible places, in float32.

        Args:
            latent: `[K * N, prefix + visible, embed_dim[2]]`; no class token has a place.
            ids_restore: `[K * N, L]`, see `random_masking`.
            features: `[N, L, mimic_dim]`, of the teacher for the whole images.

        Returns:
            A scalar.
        """
        tokens = self.mimic(latent[:, self.num_prefix_tokens :])
        with torch.autocast(latent.device.type, enabled=False):
            ids_keep = torch.argsort(ids_restore, dim=1)[:, : tokens.shape[1]]
            features = torch.cat([features] * (len(latent) // len(features)))
            return F.mse_loss(tokens.float(), gather_tokens(features, ids_keep).float())

    def target(self, imgs: Tensor, valid: Tensor | None = None) -> Tensor:
        """The values to predict: `[N, C, *img_size]` to `[N, L, patch_pixels * C]`.

        With `valid`, of the result's shape, 1 for the values that count and 0 for the others, the
        others do not count for a patch's mean and variance.
        """
        patches = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, var = patch_moments(patches, valid)
            patches = (patches - mean) / (var + 1e-6) ** 0.5
        return patches

    def undo_target(self, pred: Tensor, imgs: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predictions, or what `target` gave of `imgs`, in the units of the pixels.

        Args:
            pred: `[N, L, patch_pixels * C]`.
            imgs: `[N, C, *img_size]`, whose patches were normalised.
            valid: as in `target`.
        """
        if not self.norm_pix_loss:
            return pred
        mean, var = patch_moments(self.patchify(imgs), valid)
        return pred * (var + 1e-6) ** 0.5 + mean

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        predict_share: float = 1.0,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One pretraining forward pass.

        Args:
            imgs: `[N, C, *img_size]`.
            mask_ratio: share of patches to remove.
            noise: `[N, U]`, what decides the mask, see `random_masking`. If not given it is drawn
                before anything else, so that a seed gives the published code's mask.
            predict_share: share of the removed patches to predict, see `choose_predicted`.
            features: `[N, L, mimic_dim]`, a teacher's tokens of the whole images; with them the
                loss is that of the pixels and `mimic_weight` times `mimic_loss`, and a fourth
                value is returned.
            valid: `[N, C, *img_size]`, bool: the values that take part in the loss.

        Returns:
            loss: a scalar.
            pred: `[K * N, L, patch_pixels * C]`, a prediction for every patch; `K` is 1 unless
                the model is `complementary`, see `random_masking`. With a `predict_share` below
                1, of the patches that are chosen alone.
            mask: `[K * N, L]`, 1 where removed.
            parts: with `features` alone: "loss_reconstruction", that of the pixels, and
                "loss_mimic", before its weight; without gradient.

        Raises:
            ValueError: images of another shape, or a ratio or share that leaves nothing.
        """
        self.check_input(imgs)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        ids_predict = None
        if predict_share != 1:
            predicted = self.geometry.predicted_patches(mask_ratio, predict_share)
            visible = latent.shape[1] - self.num_prefix_tokens
            ids_predict = self.choose_predicted(ids_restore, visible, predicted)
        pred = self.forward_decoder(latent, ids_restore, ids_predict)
        loss = self.forward_loss(imgs, pred, mask, ids_predict, valid)
        if features is None:
            return loss, pred, mask
        mimic = self.mimic_loss(latent, ids_restore, features)
        parts = {"loss_reconstruction": loss.detach(), "loss_mimic": mimic.detach()}
        return loss + self.mimic_weight * mimic, pred, mask, parts


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


def fastconvmae_convvit_base_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """FastConvMAE-B: ConvMAE-B with complementary masks. `kwargs` override any argument."""
    return convmae_convvit_base_patch16(**{"complementary": True, **kwargs})


# The original repository's names for the base models.
convmae_convvit_base_patch16_dec512d8b = convmae_convvit_base_patch16
fastconvmae_convvit_base_patch16_dec512d8b = fastconvmae_convvit_base_patch16

# Model name to factory, for command lines and checkpoints.
MODELS = {
    "convmae_convvit_tiny_patch16": convmae_convvit_tiny_patch16,
    "convmae_convvit_small_patch16": convmae_convvit_small_patch16,
    "convmae_convvit_base_patch16": convmae_convvit_base_patch16,
    "convmae_convvit_base_patch16_dec512d8b": convmae_convvit_base_patch16_dec512d8b,
    "convmae_convvit_large_patch16": convmae_convvit_large_patch16,
    "convmae_convvit_huge_patch16": convmae_convvit_huge_patch16,
    "fastconvmae_convvit_base_patch16": fastconvmae_convvit_base_patch16,
    "fastconvmae_convvit_base_patch16_dec512d8b": fastconvmae_convvit_base_patch16_dec512d8b,
}


def convmae_from_weights(
    weights: Weights,
    models: Mapping[str, Callable[..., MaskedAutoencoderConvViT]] = MODELS,
    ndim: int = 2,
) -> MaskedAutoencoderConvViT:
    """The masked autoencoder that weights belong to, read off their shapes and arguments, filled.

    Args:
        weights: of a pretraining; where its arguments name no model, see `Weights.guessed`.
        models: the names that are known.
        ndim: dimensions of its input, 2 for pictures.

    Raises:
        UsageError: an unknown model, or weights that are not a whole autoencoder.
    """
    path, args = weights.path, weights.args
    name = args.get("model", next(iter(models)))  # of any size: all sizes are given
    if weights.kind != "autoencoder":
        raise UsageError(
            f"checkpoint {path} is {KINDS[weights.kind]}: only a whole autoencoder can reconstruct"
        )
    if name not in models:
        raise UsageError(
            f"checkpoint {path}: it is no pretraining checkpoint: its model is {name!r}, not one "
            f"of {', '.join(models)}"
        )
    if weights.architecture.ndim != ndim:
        kinds = {2: "pictures", 3: "videos"}
        raise UsageError(
            f"checkpoint {path} is a model of {kinds[weights.architecture.ndim]}, not of "
            f"{kinds[ndim]}"
        )
    settings = ("norm_pix_loss", "masking", "complementary", "mimic_dim")
    known = {name: args[name] for name in settings if args.get(name) is not None}
    if "mimic.bias" in weights.state:
        known["mimic_dim"] = len(weights.state["mimic.bias"])
    kwargs = {**weights.architecture.kwargs(), **asdict(weights.decoder), **known}
    try:
        model = models[name](**kwargs)
    except ValueError as error:
        raise UsageError(f"checkpoint {path}: {error}") from error
    more = load_weights(model, weights).unexpected
    if more:
        raise UsageError(
            f"checkpoint {path} holds {len(more)} weights that a {name} does not have: {more[0]}, …"
        )
    return model


def convmae_from_checkpoint(path: str | Path) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining checkpoint, with its weights.

    Args:
        path: a file of this framework or of the original code, or safetensors.

    Raises:
        UsageError: a file that cannot be read, or see `convmae_from_weights`.
    """
    return convmae_from_weights(read_weights(path))
