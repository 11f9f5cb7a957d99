"""The arms of the proof: what is pretrained, and what the paper says of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pretrain_step import TINY_DECODER
from benchmarks.reference import (
    DenseMaskedAutoencoder,
    PlainMaskedAutoencoder,
    conv_block_on_grid,
    conv_on_grid,
    patch_embed_on_grid,
)
from models_convmae import MaskedAutoencoderConvViT
from util.layers.geometry import Geometry
from util.layers.pos_embed import get_sincos_pos_embed

# The share of the labels, in percent, that the ablations are fine-tuned with.
ABLATION_SHARE = 10.0
# The decoder of each size; the others have the paper's, which is the default.
DECODERS = {"tiny": TINY_DECODER}


class LeakyMaskedAutoencoder(DenseMaskedAutoencoder):
    """ConvMAE without masked convolution: visible tokens see removed ones within the kernel."""

    def convolution_masks(self, mask: Tensor) -> dict[int, Tensor | None]:
        """Nothing is hidden from the convolutions."""
        return {1: None, 2: None}


class Stage1MaskedAutoencoder(MaskedAutoencoderConvViT):
    """ConvMAE with masks drawn on the tokens of stage 1 instead of block-wise.

    Removed tokens are zero after their embedding and hidden from the convolutions; a token of
    stage 2 is hidden if all tokens under it are. Nearly every block has visible tokens then, so
    stage 3 keeps all of them (what block-wise masks are there to avoid, paper section 3.2), and
    the decoder has no place for a mask token. The loss is of the removed pixels.
    """

    def random_masking(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose for each image the tokens of stage 1 to keep, uniformly at random.

        Args:
            imgs: `[N, …]`; only the number and the device matter.
            mask_ratio: share of the `L1` tokens of stage 1 to remove.
            noise: `[N, L1]`, the smallest values stay; of another size it is drawn here, as the
                engine knows the number of blocks alone.

        Returns:
            ids_keep: `[N, L]`, all blocks in order.
            mask: `[N, 1, *grid1]`, float, 0 keep, 1 removed.
            ids_restore: `ids_keep`.
        """
        grid = self.geometry.grid(1)
        tokens = grid[0] * grid[1]
        if noise is None or noise.shape[1] != tokens:
            noise = torch.rand(len(imgs), tokens, device=imgs.device)
        keep = int(tokens * (1 - mask_ratio))
        mask = (noise.argsort(dim=1).argsort(dim=1) >= keep).float()
        ids = torch.arange(self.geometry.num_patches, device=imgs.device).expand(len(imgs), -1)
        return ids, mask.view(-1, 1, *grid), ids

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode all blocks, fuse the stages: see the base class, but for the mask."""
        _, mask, ids_restore = self.random_masking(imgs, mask_ratio, noise)
        x = patch_embed_on_grid(self.patch_embed1, imgs) * (1 - mask)
        for block in self.blocks1:
            x = conv_block_on_grid(block, x, mask) * (1 - mask)
        stage1, hidden = x, -F.max_pool2d(-mask, self.geometry.patch_size[1])
        x = patch_embed_on_grid(self.patch_embed2, x) * (1 - hidden)
        for block in self.blocks2:
            x = conv_block_on_grid(block, x, hidden) * (1 - hidden)
        stage2 = x
        x = self.patch_embed4(_tokens(patch_embed_on_grid(self.patch_embed3, x))) + self.pos_embed
        for block in self.blocks3:
            x = block(x)
        if self.multi_scale:
            x = x + _tokens(conv_on_grid(self.stage1_output_decode, stage1))
            x = x + _tokens(conv_on_grid(self.stage2_output_decode, stage2))
        return self.norm(x), mask, ids_restore

    def forward_loss(
        self,
        imgs: Tensor,
        pred: Tensor,
        mask: Tensor,
        ids_predict: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the removed pixels; `mask` as `random_masking` gives it.

        Raises:
            ValueError: some patches or values alone count: all have removed pixels.
        """
        if ids_predict is not None or valid is not None:
            raise ValueError("with masks of stage 1 every patch is predicted")
        with torch.autocast(imgs.device.type, enabled=False):
            removed = F.interpolate(mask, self.geometry.img_size, mode="nearest-exact")
            removed = self.patchify(removed.expand(-1, self.in_chans, -1, -1))
            target = self.target(imgs.float())
            return ((pred.float() - target) ** 2 * removed).sum() / removed.sum()


def _tokens(grid: Tensor) -> Tensor:
    """A grid `[N, C, *grid]` as tokens `[N, L, C]`."""
    return grid.flatten(2).transpose(1, 2)


def plain_autoencoder(**kwargs) -> PlainMaskedAutoencoder:
    """The plain MAE beside a ConvMAE: its stage 3's width, heads and tokens, one block more.

    Args:
        **kwargs: of `MaskedAutoencoderConvViT`; those that a plain MAE has not are left out.
    """
    shared = ("img_size", "in_chans", "num_heads", "norm_pix_loss")
    kept = {k: v for k, v in kwargs.items() if k in shared or k.startswith("decoder")}
    return PlainMaskedAutoencoder(
        patch_size=Geometry.of(kwargs["img_size"], kwargs["patch_size"]).stride(3),
        embed_dim=kwargs["embed_dim"][2],
        depth=kwargs["depth"][2] + 1,
        **kept,
    )


@dataclass(frozen=True)
class Arm:
    """One thing to measure.

    Attributes:
        name: on the command line, of the folder.
        what: for the tables.
        family: "convvit" or "plain", the encoder that is measured.
        build: from the arguments of `MaskedAutoencoderConvViT` to a masked autoencoder.
        changes: arguments that differ from the ConvMAE of this size.
        flags: of `main_pretrain.py` that differ.
        depth: blocks of the three stages, if they differ.
        pretrained: whether it is pretrained at all.
        main: measured as it trains and fine-tuned with every share of the labels, which costs the
            most; the others are fine-tuned with one.
        equal_cost: pretrained for as many FLOPs as ConvMAE instead of as many epochs.
        mimics: has the ConvViT of the arm `TEACHER`, trained with all labels, as its teacher.
    """

    name: str
    what: str
    family: str = "convvit"
    build: Callable[..., nn.Module] = MaskedAutoencoderConvViT
    changes: Mapping[str, object] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    depth: tuple[int, ...] | None = None
    pretrained: bool = True
    main: bool = False
    equal_cost: bool = False
    mimics: bool = False

    def factory(self, size: str) -> Callable[..., nn.Module]:
        """For a size of `SIZES`: the pretraining model from an encoder's arguments."""
        return lambda **kwargs: self.build(
            **{**kwargs, **DECODERS.get(size, {}), **self.changes},
        )

    def shares(self, shares: Iterable[float]) -> list[float]:
        """Of shares of the labels, in percent, those that it is fine-tuned with."""
        return [share for share in shares if self.main or share == ABLATION_SHARE]


_PLAIN = dict(family="plain", build=plain_autoencoder)
_FAST = ("--complementary",)
# Whose fine-tuning with all labels gives the teacher of `mimic`.
TEACHER = "random"

ARMS = {
    arm.name: arm
    for arm in (
        Arm("random", "ConvViT, random weights", pretrained=False, main=True),
        Arm("random_plain", "ViT, random weights", pretrained=False, main=True, **_PLAIN),
        Arm("mae", "plain MAE", main=True, **_PLAIN),
        Arm("mae_cost", "plain MAE, as many FLOPs", main=True, equal_cost=True, **_PLAIN),
        Arm("convmae", "ConvMAE", main=True),
        Arm("fast", "FastConvMAE, as many epochs", flags=_FAST, main=True),
        Arm("fast_cost", "FastConvMAE, as many FLOPs", flags=_FAST, main=True, equal_cost=True),
        Arm("leaky", "without masked convolution", build=LeakyMaskedAutoencoder),
        Arm("single_scale", "without multi-scale decoder", changes=dict(multi_scale=False)),
        Arm("stage1_masks", "masks drawn at stage 1", build=Stage1MaskedAutoencoder),
        Arm("mimic", "MR-MCMAE, teacher trained with the labels", mimics=True),
        Arm("kernel3", "3×3 convolutions", changes=dict(kernel_size=3)),
        Arm("kernel7", "7×7 convolutions", changes=dict(kernel_size=7)),
        Arm("shallow", "one block a convolution stage", depth=(1, 1, 4)),
        Arm("ratio50", "50 % removed", flags=("--mask_ratio", "0.5")),
        Arm("ratio90", "90 % removed", flags=("--mask_ratio", "0.9")),
        Arm("pixels", "plain pixels as target", flags=("--no_norm_pix_loss",)),
    )
}


@dataclass(frozen=True)
class Claim:
    """The paper's order of two arms.

    Attributes:
        better, worse: names of the arms.
        says: the paper's direction, in words.
    """

    better: str
    worse: str
    says: str


CLAIMS = (
    Claim("convmae", "random", "pretraining helps"),
    Claim("mae", "random_plain", "pretraining helps (MAE's finding)"),
    Claim("convmae", "mae", "better than a plain MAE (+1.4 of 83.6 % on ImageNet, base)"),
    Claim("convmae", "mae_cost", "better than a plain MAE, at equal computation"),
    Claim("convmae", "leaky", "masked convolution helps"),
    Claim("convmae", "stage1_masks", "block-wise masks cost less and are no worse"),
    Claim("fast", "convmae", "in as many epochs complementary masks are better"),
    Claim("fast_cost", "convmae", "at equal computation complementary masks are no worse"),
    Claim("mimic", "convmae", "a teacher's tokens to mimic help"),
    Claim("convmae", "single_scale", "the multi-scale decoder helps"),
    Claim("convmae", "shallow", "two blocks in each convolution stage, as in the paper"),
    Claim("kernel7", "convmae", "larger kernels help a little"),
    Claim("convmae", "kernel3", "larger kernels help a little"),
    Claim("convmae", "ratio50", "75 % is the ratio to remove"),
    Claim("convmae", "ratio90", "75 % is the ratio to remove"),
    Claim("convmae", "pixels", "normalised pixels are the better target (MAE's finding)"),
)


def plain_state(state: Mapping[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
    """The encoder's weights of a `PlainMaskedAutoencoder` under the names of timm's ViT.

    The final norm begins anew, as that of a ConvViT does.

    Args:
        state: of the autoencoder.
        grid: patches along each dimension, for the position table, of which MAE's row for the
            class token is zero.
    """
    kept = {
        name.replace("patch_embed.", "patch_embed.proj."): tensor
        for name, tensor in state.items()
        if name.split(".")[0] in ("patch_embed", "blocks", "cls_token")
    }
    width = kept["cls_token"].shape[-1]
    table = torch.from_numpy(get_sincos_pos_embed(width, grid)).float()
    return kept | {"pos_embed": torch.cat([torch.zeros(1, width), table]).unsqueeze(0)}
